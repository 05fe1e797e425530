"""Pure tensor mathematics: tensors in, tensors out, on the device of the inputs."""
