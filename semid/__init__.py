"""Embeddings to semantic IDs. Public names are resolved on first use, so that `import semid` stays light."""
__version__ = "0.1.0"

from importlib import import_module
from typing import Any

_HOME = {
    "config": "root params Params seed_everything device SemidError SemanticIdError NotFittedError "
              "ShapeMismatchError DataError ModelFormatError ConfigError",
    "feature_files": "FeatureWriter write_features",
    "features": "Features open_features read_features",
    "sources": "data_fingerprint features_from_npy load_source",
    "collection": "Collection collect open_collection",
    "tracking": "start_run",
    "training": "train",
    "classifier": "ImageClassifier train_classifier",
    "quality.degradations": "degrade",
    "quality.model": "QualityAssessmentInference train_quality",
    "quality.refiner": "VisualDegradationsRefiner score_pictures",
    "ranking.contrastive": "train_ranking",
    "ranking.encoders": "open_encoder",
    "ranking.embedding": "embed_collection",
    "ranking.metrics": "retrieval_metrics",
    "clustering.nearest": "nearest",
    "clustering.kmeans": "KMeans",
    "clustering.inference": "KMeansInference",
    "clustering.balanced": "BalancedKMeans assign_with_bounds assign_costs_with_bounds",
    "clustering.distributed": "DistributedKMeans",
    "clustering.mapping": "assign_parquet",
    "clustering.duplicates": "Duplicates",
    "clustering.dedup": "SemanticDeduplicator write_kept",
    "semantic_ids.rq_kmeans": "RQKMeans",
    "semantic_ids.formatting": "codes_to_ids ids_to_codes",
    "semantic_ids.rq_vae": "RQVAE",
    "semantic_ids.uniqueness": "CollisionStore InMemoryCollisionStore SQLiteCollisionStore UniqueIdResolver",
    "semantic_ids.relocation": "relocate",
    "semantic_ids.resolvers": "RelocationResolver SinkhornResolver",
    "semantic_ids.id_registry": "IdRegistry IdVersion",
    "semantic_ids.interchange": "import_index to_dataset tokens_of write_index write_parquet",
    "semantic_ids.prefix_trie": "PrefixTrie PrefixConstraint",
    "semantic_ids.engine": "SemanticIdEngine",
    "semantic_ids.metrics": "evaluate evaluate_quality find_similar hierarchical_distance recall_at_k ndcg_at_k",
    "semantic_ids.report": "report load_report",
    "semantic_ids.drift": "compare",
    "semantic_ids.sweep": "sweep",
    "semantic_ids.out_of_core": "encode_parquet fit_parquet",
    "serving.database": "DatabaseWriter ImageDatabase",
    "serving.search": "create_predictor",
    "serving.service": "create_app",
    "models.boundary": "BoundaryRegressor train_boundary",
    "models.onnx": "export_encoder quantize_encoder",
    "models.prepare": "download_models list_models verify_models",
    "models.reranker": "Reranker export_reranker",
    "registry.entities": "Change ConflictError Dataset Model ModelContent ModelPageInfo ModelTrainClass "
                         "NotFoundError Slice Undefined",
    "registry.filters": "ClassAP ModelsFilter ModelsFilterOptions",
    "registry.stores": "MirrorError",
    "registry.slices": "SliceService",
    "registry.service": "ModelService",
    "registry.api": "create_registry_app serve_registry",
    "registry.client": "RegistryClient",
}
_MODULE_OF = {name: f"semid.{module}" for module, names in _HOME.items() for name in names.split()}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'semid' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
