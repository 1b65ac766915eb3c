"""The training run around the model: arguments, engine, loop, checkpoints, monitors."""
