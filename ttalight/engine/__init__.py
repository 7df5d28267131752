"""The engine of adaptation: runs a method on any network. It knows nothing of Lightning."""

from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.engine.engine import Engine
from ttalight.engine.method import Method
from ttalight.engine.observer import Observer
from ttalight.models.attaching.takeover import release

__all__ = ["AdaptiveNetwork", "Engine", "Method", "Observer", "release"]
