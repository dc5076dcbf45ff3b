"""One TOML describes one run; it is checked whole before anything is read or started. One file for each table."""

from des_core.config.cluster import LAUNCHER_BYTES, ClusterConfig, worker_limit
from des_core.config.fields import FieldConfig
from des_core.config.gate import GateConfig
from des_core.config.ingest import IngestConfig
from des_core.config.load import load_config, parse_config
from des_core.config.model import MODELS, ModelConfig
from des_core.config.optimizer import OptimizerConfig, OptimizersConfig, RowOptimizerConfig
from des_core.config.place import NotifyConfig, RegistryConfig, RunConfig, StorageConfig
from des_core.config.recurring import EvalConfig, RecurringConfig
from des_core.config.section import Section
from des_core.config.source import JoinConfig, SourceConfig, SplitConfig
from des_core.config.table import TableConfig
from des_core.config.train import STEERING, TrainConfig
from des_core.config.whole import Config

__all__ = [
    "LAUNCHER_BYTES",
    "MODELS",
    "STEERING",
    "ClusterConfig",
    "Config",
    "EvalConfig",
    "FieldConfig",
    "GateConfig",
    "IngestConfig",
    "JoinConfig",
    "ModelConfig",
    "NotifyConfig",
    "OptimizerConfig",
    "OptimizersConfig",
    "RecurringConfig",
    "RegistryConfig",
    "RowOptimizerConfig",
    "RunConfig",
    "Section",
    "SourceConfig",
    "SplitConfig",
    "StorageConfig",
    "TableConfig",
    "TrainConfig",
    "load_config",
    "parse_config",
    "worker_limit",
]
