"""Pages that show what a run did, or what a simulation says that one would do."""
