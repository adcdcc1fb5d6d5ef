"""The other executor: the same schedule, on a virtual clock."""
