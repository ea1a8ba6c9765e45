# SPDX-License-Identifier: Apache-2.0
from .trainable import TrainableWeights as TrainableWeights
from .trainable import parse_trainable as parse_trainable
