"""What both executors emit, how it is kept, compared and shown."""

from weightstream.trace.spans import Span, Total, totals

__all__ = ["Span", "Total", "totals"]
