"""Top-1 and top-5 accuracy as an `evaluate.Metric`: loading one by name would download its code."""

import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """
    `accuracy`: share of images whose label has the largest logit. `top5_accuracy`: share of images whose label has one of
    the five largest logits; absent for five labels or fewer, where it is always 1. An image with a NaN logit counts as wrong.

    Predictions are logits `(images, labels)`, references class indices `(images,)`.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy of logits.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        logits, labels = np.asarray(predictions), np.asarray(references)
        # An equal logit counts against the image: a network with the same logit for all classes scores 0.
        label_logits = np.take_along_axis(logits, labels[:, None], axis=1)
        rank = np.where(np.isnan(logits).any(axis=1), np.inf, (logits >= label_logits).sum(axis=1))
        results = {"accuracy": float((rank <= 1).mean())}
        if logits.shape[1] > 5:
            results["top5_accuracy"] = float((rank <= 5).mean())
        return results
