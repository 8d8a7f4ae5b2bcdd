from .utils import DatasetMixtureConfig as DatasetMixtureConfig
from .utils import ScriptArguments as ScriptArguments
from .utils import TrlParser as TrlParser
from .utils import get_dataset as get_dataset
