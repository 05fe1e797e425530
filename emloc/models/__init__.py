"""Kinds of models: where their weights are, which layers are adapted, how a batch is made."""
