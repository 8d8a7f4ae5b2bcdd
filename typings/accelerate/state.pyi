from typing import Any

GradientState: Any
