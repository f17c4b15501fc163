"""Command-line programs that measure prelu_gpu and show it at work."""
