"""Speed and memory beside the peers, at full size on a GPU and small on a CPU (`make bench`)."""
