"""nvfp4-qat inside of frameworks that train with reinforcement learning."""
