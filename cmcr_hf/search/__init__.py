"""Search folders of images, sounds and texts with a connected model."""

from .index import Answer, Hit, SearchIndex, read_query

__all__ = ["Answer", "Hit", "SearchIndex", "read_query"]
