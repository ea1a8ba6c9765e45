# SPDX-License-Identifier: Apache-2.0
from .metadata import Topic as Topic
from .reader import BagReader as BagReader
from .reader import Message as Message
from .reader import open_bag as open_bag
from .writer import write_bag as write_bag
