"""Text to token shards, and the order in which training visits them. Never imports torch."""

from hybridlm.data.order import Batch, BatchOrder
from hybridlm.data.packing import PackedOrder, order_of
from hybridlm.data.shards import tokenize
from hybridlm.data.sources import Document, Source
from hybridlm.data.tokens import TokenFolder, TokenStream

__all__ = ["Batch", "BatchOrder", "Document", "PackedOrder", "Source", "TokenFolder", "TokenStream", "order_of",
           "tokenize"]
