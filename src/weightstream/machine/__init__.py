"""The machine in front of us: its profile, and how that is measured."""
