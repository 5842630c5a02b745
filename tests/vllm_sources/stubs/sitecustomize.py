"""Loads the stand-ins in every process that has this folder on its path.

vLLM inspects model classes in processes of its own.
"""

import compiled_modules
import cuda_platform

compiled_modules.install()
cuda_platform.install()
compiled_modules.install_operations()
