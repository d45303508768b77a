"""Augmentation changes a picture as the paper allows: never by inverting its colours."""

import numpy as np
from PIL import Image

from models.augmentation import MAGNITUDE, POLICIES, augmented
from tests.models.conftest import drawing


def test_every_policy_keeps_what_is_bright_brighter_than_what_is_dark() -> None:
    ramp = np.repeat(np.linspace(40, 215, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)

    for name, policy in POLICIES.items():
        for sign in (-1, 1):
            middle = np.asarray(policy(Image.fromarray(ramp), sign * MAGNITUDE))[24:40, 24:40].astype(int)
            assert middle[:, -1].mean() > middle[:, 0].mean(), name
    assert not {"invert", "solarize"} & set(POLICIES)


def test_an_augmented_picture_has_the_side_that_is_asked_for_and_depends_on_the_generator_alone() -> None:
    picture = drawing(3, 256)

    one, same, other = (augmented(picture, 224, np.random.default_rng(seed)) for seed in (1, 1, 2))

    assert one.shape == (224, 224, 3) and one.dtype == np.uint8
    assert np.array_equal(one, same) and not np.array_equal(one, other)
