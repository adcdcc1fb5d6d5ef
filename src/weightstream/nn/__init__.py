"""Modules for anyone's model whose weights are records of a store and never exist as a whole."""

from weightstream.nn.experts import StreamedExperts
from weightstream.nn.pool import Pool
from weightstream.nn.routers import HashRouter, ProductKeyRouter, Router

__all__ = ["HashRouter", "Pool", "ProductKeyRouter", "Router", "StreamedExperts"]
