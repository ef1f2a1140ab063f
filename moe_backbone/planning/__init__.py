"""Plans of training runs: parameters, operations, memory, communication and time, computed before a run starts."""

from .hardware import find_gpu as find_gpu
from .plan import REMEDIES as REMEDIES
from .plan import TIGHT as TIGHT
from .plan import Plan as Plan
from .plan import load_config as load_config
from .plan import make_plan as make_plan
from .setup import TrainingSetup as TrainingSetup
