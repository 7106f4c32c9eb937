"""The options of `cmcr convert`, which know nothing of torch."""

from __future__ import annotations

import argparse
from pathlib import Path

# What each kind is made of, what there is to know of it, and an example.
CONVERSIONS = {
    "cmcr": (
        "the heads of C-MCR, clap_clip.pt or ulip_clip.pt",
        "Without sources the result is a connector alone; with all of them a full model that also holds fingerprints "
        "of them. The heads of clap_clip.pt belong to the LAION-CLAP file that they were trained on, not to the CLAPs "
        "on the Hub, so that no source is taken by default.",
        "cmcr convert cmcr --checkpoint clap_clip.pt --clip openai/clip-vit-base-patch32 --clap models/clap --output "
        "models/cmcr-clip-clap",
    ),
    "ex-mcr": (
        "the heads of Ex-MCR, ex_clap.pt and ex_ulip.pt",
        "CLIP is the shared space and stays as it is; with both files, images, texts, sounds and point clouds are in "
        "one model.",
        "cmcr convert ex-mcr --checkpoint ex_clap.pt ex_ulip.pt --output models/ex-mcr",
    ),
    "laion-clap": (
        "a LAION-CLAP checkpoint with HTSAT and RoBERTa",
        "HTSAT-tiny, fused or not, and HTSAT-base become a ClapModel with its processor.",
        "cmcr convert laion-clap --checkpoint 630k-fusion-best.pt --output models/clap",
    ),
    "open-clip": (
        "an open_clip CLIP with a plain ViT, as a file or by its name",
        "It becomes a CLIPModel with its processor. The activation and the preprocessing come from the "
        "open_clip_config.json beside the file. NAME/TAG needs open_clip itself. Models of other architectures are "
        "used without conversion, as the source open_clip:NAME/TAG.",
        "cmcr convert open-clip --checkpoint ViT-B-32/laion2b_s34b_b79k --output models/clip",
    ),
    "ulip": (
        "a ULIP checkpoint with PointBERT, such as pointbert_ULIP-2.pt",
        "It becomes a UlipModel with the preprocessing of its image and text towers.",
        "cmcr convert ulip --checkpoint pointbert_ULIP-2.pt --output models/ulip",
    ),
}


def add_kinds(parser: argparse.ArgumentParser) -> None:
    """Add a command for each kind of conversion, with its options."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    added = {
        kind: kinds.add_parser(
            kind, help=text, description=f"{text[0].upper()}{text[1:]}. {details}", epilog=f"Example: {example}"
        )
        for kind, (text, details, example) in CONVERSIONS.items()
    }
    for kind, own in added.items():
        own.add_argument(
            "--checkpoint",
            required=True,
            nargs="+" if kind == "ex-mcr" else 1,
            metavar="FILE",
            help="ex_clap.pt, ex_ulip.pt or both; a file of another name as clap=FILE or ulip=FILE"
            if kind == "ex-mcr"
            else "a .pt, .bin or .safetensors file, or NAME/TAG of open_clip"
            if kind == "open-clip"
            else "the released file",
        )
        own.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for the model")
        own.add_argument("--push", metavar="ORG/NAME", help="also push the folder to the Hub, in one commit")
        own.add_argument(
            "--licence",
            default="cc-by-4.0" if kind == "cmcr" else None,
            metavar="ID",
            help="licence of the released weights for the card, as the Hub names it (default: %(default)s)"
            if kind == "cmcr"
            else "licence of the released weights for the card, as the Hub names it (default: not stated)",
        )
    for kind in ("cmcr", "ex-mcr"):
        for space, what in (("clip", "image-text"), ("clap", "audio-text"), ("ulip", "point cloud")):
            added[kind].add_argument(
                f"--{space}", metavar="MODEL", help=f"the {what} source, a folder or Hub id, for a full model"
            )
        added[kind].add_argument(
            "--connector-only",
            action="store_true",
            help="with sources: write the heads alone, with the names and fingerprints of the sources",
        )
    added["open-clip"].add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="folder or Hub id of its tokenizer (default: that of open_clip where it is installed, else "
        "openai/clip-vit-base-patch32)",
    )
    added["open-clip"].add_argument(
        "--activation",
        choices=("gelu", "quick_gelu"),
        help="of a file without an open_clip_config.json: quick_gelu for OpenAI's weights and those trained like them",
    )
    for kind, name in (("laion-clap", "FacebookAI/roberta-base"), ("ulip", "openai/clip-vit-base-patch32")):
        added[kind].add_argument(
            "--tokenizer",
            default=name,
            metavar="MODEL",
            help="folder or Hub id of its tokenizer (default: %(default)s)",
        )
