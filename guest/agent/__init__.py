"""The agent: PID 1 of the guest, which does what the shim asks over Kata's agent protocol."""
