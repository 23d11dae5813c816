"""What the commands are made of: naming a model, its outputs, ``explain``, ``diff``, ``demo``."""
