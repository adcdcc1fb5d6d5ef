"""`weightstream demo 120t`: real training steps among 123 trillion parameters, killed three times, then branched."""
