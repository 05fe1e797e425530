"""The same training with less memory and fewer, larger operations (`train.lean`).

Every file replaces one thing of the plain path by something that computes the same numbers, to the
rounding of the model's dtype: the adapted layers, the token embedding, the loss, the activations.
"""
