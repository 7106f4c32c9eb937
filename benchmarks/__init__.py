"""Speed against peers and floors: one module a table, ratios of one run on one machine."""

# Before transformers, which cannot be imported beside a torchvision that this has yet to repair.
import cmcr_hf  # noqa: F401
