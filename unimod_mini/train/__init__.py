"""What train_full.py stands on: the step over processes, checkpoints, metrics, CUDA graphs."""
