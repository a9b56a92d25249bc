"""Part of a test double of nvidia-modelopt."""
