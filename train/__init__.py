"""The trainer: image classification with a pre-activation ResNet on any number of ranks."""
