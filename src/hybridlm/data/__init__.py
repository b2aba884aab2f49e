"""Text to token shards, and the order in which training visits them. Never imports torch."""

from hybridlm.data.mixture import Mixture, join, parse_mixture
from hybridlm.data.order import Batch, BatchOrder
from hybridlm.data.packing import PackedOrder, order_of
from hybridlm.data.shards import tokenize
from hybridlm.data.sources import Document, Source
from hybridlm.data.tokens import TokenFolder, TokenStream

__all__ = ["Batch", "BatchOrder", "Document", "Mixture", "PackedOrder", "Source", "TokenFolder", "TokenStream", "join",
           "order_of", "parse_mixture", "tokenize"]
