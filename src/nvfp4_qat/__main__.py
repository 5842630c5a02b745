"""``python -m nvfp4_qat`` is the ``nvfp4-qat`` command."""

import sys

from .cli import main

sys.exit(main())
