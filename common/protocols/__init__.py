"""The messages of other people's protocols: containerd's and the Kata agent's."""
