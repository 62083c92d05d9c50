"""What samples of the shipped model of digits are held against: the training digits, in the features of a classifier of them.

This file knows no sampler and no claim.
"""

from typing import final

from torch import Tensor

from fewstep.report.images_cells import Reference
from fewstep.report.quality import frechet_distance
from fewstep.report.quality_features import classifier_of, features
from fewstep.training.data.arrays import PARTS, DigitsConfig

TEACHER = "digits-edm"
DEVIATION = 0.75  # of its x_0, by which learned grids are scaled


@final
class Digits:
    """`count`: of training digits, and so of samples; `held_out` [N,1,8,8]: digits that the model never saw.

    Cost: a classifier's training from `seed`, some ten seconds, unless it is in the cache.
    """

    def __init__(self, seed: int) -> None:
        data = DigitsConfig(classes=True)
        table = data.build()
        train, self.held_out = (table.rows(part).extra["x"] for part in PARTS)
        classifier = classifier_of(data, seed=seed)
        self.count, self._known = len(train), features(classifier, train)
        self._classifier = classifier
        self._reference = Reference(train.flatten(1), self.held_out.flatten(1), table.shape, classifier)

    def frechet(self, x: Tensor) -> float:
        """The Frechet distance of images x [N,1,8,8] from the training digits."""
        return frechet_distance(features(self._classifier, x), self._known)

    def scores(self, x: Tensor) -> dict[str, float]:
        """The same beside precision, recall, copying, and distances in pixels. Cost: about a second more."""
        return self._reference.scores(x)
