"""``samdetr predict``: drawn pictures and COCO JSON for an image or a folder of images."""

from __future__ import annotations

from typing import Annotated

import typer


def predict(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="Run folder, of which the best checkpoint is taken, or a checkpoint such as RUN/checkpoints/last.",
        ),
    ],
    source: Annotated[str, typer.Argument(metavar="IMAGE_OR_FOLDER", help="An image, or a folder of images.")],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Where the pictures and predictions.json are written; it must not hold earlier ones.",
        ),
    ] = "predictions",
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.0, max=1.0, help="Lowest score that is drawn and written.")
    ] = 0.3,
) -> None:
    """Find objects in an image or a folder of images."""
    from samdetr.engine.predict import predict as run_prediction

    run_prediction(checkpoint, source, output=output, threshold=threshold)
