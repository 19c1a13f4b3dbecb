"The snippets of the document that the registry's API comes from: only the imports are semid's."
from datetime import datetime

import pytest

from semid import (ModelService, ModelsFilter, ModelsFilterOptions, ModelTrainClass, NotFoundError,
                   SliceService)


@pytest.fixture
def names(tmp_path, monkeypatch):
    "What the snippets take for granted: a dataset, its slices, two models, stored weights."
    monkeypatch.setenv("SEMID_REGISTRY", str(tmp_path / "registry.db"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    service = ModelService(mirror=None)
    service.create_dataset("dataset_123")
    sizes = {"slice_train_001": 2300, "slice_val_001": 500, "slice_train": 2000, "slice_val": 500}
    for name, n in sizes.items():
        service.create_slice("dataset_123", name, data_count=n)
    service.create_model("dataset_123", "Detector", "yolov8n", ["slice_train"], model_id="model_456")
    service.create_model("dataset_123", "Best", "yolov8n", is_trained=True, model_id="model_best_v5")
    (tmp_path / "weights.safetensors").write_bytes(bytes(range(64)))
    service.add_content(tmp_path / "weights.safetensors", "content_trained_weights_001")
    return service


def test_basic_operations(names, capsys):
    model_service = ModelService()

    models, next_cursor, total_count = model_service.get_models(
        dataset_id="dataset_123",
        length=10
    )

    print(f"Found {total_count} models")
    for model in models:
        print(f"- {model.name} (Baseline: {model.baseline_model})")
        print(f"  Trained: {model.is_trained}, Pinned: {model.is_pinned}")

    model = model_service.get_model(
        dataset_id="dataset_123",
        model_id="model_456"
    )

    print(f"Model: {model.name}")
    print(f"Training data: {model.training_data_count}")
    print(f"Validation data: {model.validation_data_count}")

    new_model = model_service.create_model(
        dataset_id="dataset_123",
        name="YOLOv8 Detection Model v1",
        baseline_model="yolov8n",
        description="Object detection model for vehicle detection",
        training_slice_ids=["slice_train_001"],
        validation_slice_ids=["slice_val_001"],
        training_classes=[
            ModelTrainClass(
                class_name="car",
                annotation_type="box",
                ap=0.85,
                training_annotations_count=1500,
                validation_annotations_count=300
            ),
            ModelTrainClass(
                class_name="truck",
                annotation_type="box",
                ap=0.78,
                training_annotations_count=800,
                validation_annotations_count=200
            )
        ]
    )

    print(f"Created model: {new_model.id}")
    told = capsys.readouterr().out
    assert "Found 2 models\n- Best (Baseline: yolov8n)\n  Trained: True, Pinned: False\n- Detector" in told
    assert "Model: Detector\nTraining data: 2000\nValidation data: 0\nCreated model: model_" in told
    assert model_service.get_model("dataset_123", new_model.id) == new_model
    assert new_model.average_ap == pytest.approx(0.815)


def test_entities_alone():
    from semid import Model

    model = Model(
        name="YOLOv8 Vehicle Detector",
        baseline_model="yolov8n",
        description="Real-time vehicle detection",
        training_classes=[
            ModelTrainClass(
                class_name="car",
                annotation_type="box",
                ap=0.85
            )
        ]
    )

    field_info = Model.model_fields
    print(f"Name field: {field_info['name'].description}")
    print(f"Baseline model field: {field_info['baseline_model'].description}")
    assert field_info["name"].description and field_info["baseline_model"].description
    assert model.average_ap == 0.85


def test_track_training_progress_and_compare(names, capsys):
    model_service = ModelService()
    model = model_service.create_model(
        dataset_id="dataset_123",
        name="Detection Model v1",
        baseline_model="yolov8n",
        training_slice_ids=["slice_train"],
        validation_slice_ids=["slice_val"],
        is_trained=False  # Not trained yet
    )

    updated_model = model_service.update_model(
        dataset_id="dataset_123",
        model_id=model.id,
        is_trained=True,
        trained_at=datetime.now().isoformat(),
        training_classes=[
            ModelTrainClass(
                class_name="vehicle",
                annotation_type="box",
                ap=0.87,
                training_annotations_count=2000,
                validation_annotations_count=500
            )
        ],
        model_content_id="content_trained_weights_001"
    )

    print(f"Training completed at {updated_model.trained_at}")

    models_filter = ModelsFilter(
        must_filter=ModelsFilterOptions(
            is_trained=True
        )
    )

    models, _, total = model_service.get_models(
        dataset_id="dataset_123",
        models_filter=models_filter,
        length=50
    )

    for model in sorted(models, key=lambda m: m.trained_at or "", reverse=True):
        print(f"\n{model.name} ({model.baseline_model})")
        print(f"  Trained: {model.trained_at}")
        print(f"  Training data: {model.training_data_count}")

        if model.training_classes:
            avg_ap = sum(tc.ap or 0 for tc in model.training_classes) / len(model.training_classes)
            print(f"  Average AP: {avg_ap:.3f}")

            for tc in model.training_classes:
                print(f"    - {tc.class_name}: AP={tc.ap:.3f}")
    told = capsys.readouterr().out
    assert total == 2 and "Average AP: 0.870\n    - vehicle: AP=0.870" in told
    assert told.index("Detection Model v1") < told.index("Best")
    assert updated_model.model_content.files[0].size == 64


def test_pin_best_performing_models(names):
    model_service = ModelService()
    pinned_model = model_service.pin_model(
        dataset_id="dataset_123",
        model_id="model_best_v5"
    )

    print(f"Pinned model: {pinned_model.name}")

    pinned_filter = ModelsFilter(
        must_filter=ModelsFilterOptions(
            is_pinned=True
        )
    )

    pinned_models, _, _ = model_service.get_models(
        dataset_id="dataset_123",
        models_filter=pinned_filter
    )

    print(f"\nPinned models ({len(pinned_models)}):")
    for model in pinned_models:
        print(f"  - {model.name}")
    assert [model.name for model in pinned_models] == ["Best"]


def track_experiments(model_service):
    experiments = [
        {
            "name": "YOLOv8n - Baseline",
            "baseline": "yolov8n",
            "description": "Baseline with default hyperparameters"
        },
        {
            "name": "YOLOv8n - Augmented",
            "baseline": "yolov8n",
            "description": "With heavy augmentation"
        },
        {
            "name": "YOLOv8s - Large",
            "baseline": "yolov8s",
            "description": "Larger model variant"
        }
    ]

    created_models = []
    for exp in experiments:
        model = model_service.create_model(
            dataset_id="dataset_123",
            name=exp["name"],
            baseline_model=exp["baseline"],
            description=exp["description"],
            training_slice_ids=["slice_train"],
            validation_slice_ids=["slice_val"],
            meta={
                "experiment_group": "yolo_comparison",
                "created_at": datetime.now().isoformat()
            }
        )
        created_models.append(model)
        print(f"Created experiment: {model.name}")
    return created_models


def test_experiments_filters_pages_and_bulk_deletion(names):
    model_service = ModelService()
    created = track_experiments(model_service)
    model_service.create_model("dataset_123", "YOLO deprecated", "yolov5", is_trained=True)
    model_service.update_model("dataset_123", created[0].id, is_trained=True)
    same = ModelsFilter(must_filter=ModelsFilterOptions(meta={"experiment_group": "yolo_comparison"}))
    assert model_service.get_models("dataset_123", same)[2] == 3

    models_filter = ModelsFilter(
        must_filter=ModelsFilterOptions(
            name_contains="yolo",
            is_trained=True,
            is_pinned=False
        ),
        not_filter=ModelsFilterOptions(
            name_contains="deprecated"
        )
    )

    models, next_cursor, total = model_service.get_models(
        dataset_id="dataset_123",
        models_filter=models_filter,
        length=20
    )
    assert ([model.id for model in models], next_cursor, total) == ([created[0].id], None, 1)

    for n in range(120):
        model_service.create_model("dataset_123", f"experiment {n}", "yolov8n", is_pinned=n == 7)
    all_models = []
    cursor = None

    while True:
        models, cursor, total = model_service.get_models(
            dataset_id="dataset_123",
            cursor=cursor,
            length=50
        )

        all_models.extend(models)
        print(f"Loaded {len(all_models)}/{total} models")

        if not cursor:
            break

    print(f"Loaded all {len(all_models)} models")
    assert len({model.id for model in all_models}) == len(all_models) == total == 126

    old_filter = ModelsFilter(
        must_filter=ModelsFilterOptions(
            is_trained=False,
            is_pinned=False,
            name_contains="experiment"
        )
    )

    old_models, _, _ = model_service.get_models(
        dataset_id="dataset_123",
        models_filter=old_filter,
        length=50
    )

    print(f"Found {len(old_models)} old experimental models")

    for model in old_models:
        model_service.delete_model(
            dataset_id="dataset_123",
            model_id=model.id
        )
        print(f"Deleted: {model.name}")
    assert model_service.get_models("dataset_123", old_filter)[2] == 119 - 50
    assert model_service.get_models("dataset_123", deleted=True)[2] == 50


def test_best_practices(names, capsys):
    model_service = ModelService()
    dataset_id, training_slices, val_slices = "dataset_123", ["slice_train"], ["slice_val"]
    model = model_service.create_model(
        dataset_id=dataset_id,
        name="Detection Model v5",
        baseline_model="yolov8n",
        training_slice_ids=training_slices,
        validation_slice_ids=val_slices,
        meta={
            "training_config": {
                "epochs": 100,
                "batch_size": 16,
                "learning_rate": 0.001,
                "optimizer": "Adam"
            },
            "hardware": {
                "gpu": "NVIDIA A100",
                "training_time_hours": 3.5
            },
            "dataset_version": "v2.1",
            "notes": "Improved performance on small objects"
        }
    )
    deep = ModelsFilterOptions(meta={"training_config": {"epochs": 100}, "dataset_version": "v2.1"})
    assert model_service.get_models(dataset_id, ModelsFilter(must_filter=deep))[0] == [model]

    best_model_id = model_id = model.id
    model = model_service.update_model(
        dataset_id=dataset_id,
        model_id=model_id,
        meta={
            "git_commit": "abc123def456",
            "model_weights_s3": "s3://models/yolov8n_v5.pt",
            "training_script_version": "v1.2.0",
            "framework_versions": {
                "pytorch": "2.0.0",
                "ultralytics": "8.0.100"
            }
        }
    )
    assert "training_config" not in model.meta

    production_model = model_service.pin_model(
        dataset_id=dataset_id,
        model_id=best_model_id
    )

    model_service.update_model(
        dataset_id=dataset_id,
        model_id=best_model_id,
        meta={
            "status": "production",
            "deployed_at": datetime.now().isoformat(),
            "deployment_endpoint": "https://api.example.com/detect",
            "approved_by": "ml_team"
        }
    )
    assert production_model.is_pinned
    for name, ap in {"poor": 0.5, "fair": 0.8, "good": 0.95}.items():
        classes = [ModelTrainClass(class_name="car", annotation_type="box", ap=ap)]
        model_service.create_model(dataset_id, name, "yolov8n", training_classes=classes, is_trained=True)

    models, _, _ = model_service.get_models(
        dataset_id=dataset_id,
        models_filter=ModelsFilter(
            must_filter=ModelsFilterOptions(is_trained=True)
        ),
        length=100
    )

    for model in models:
        if model.training_classes:
            avg_ap = sum(tc.ap or 0 for tc in model.training_classes) / len(model.training_classes)

            if avg_ap < 0.7:
                print(f"Low performance: {model.name} (AP: {avg_ap:.3f})")
            elif avg_ap > 0.9:
                print(f"High performance: {model.name} (AP: {avg_ap:.3f})")
    told = "High performance: good (AP: 0.950)\nLow performance: poor (AP: 0.500)\n"
    assert capsys.readouterr().out == told


def test_common_issues(names):
    dataset_id, slice_id = "dataset_123", "slice_train"
    slice_service = SliceService()
    slice = slice_service.get_slice(dataset_id=dataset_id, slice_id=slice_id)
    assert slice.data_count == 2000
    with pytest.raises(NotFoundError, match="no slice 'slice_missing'"):
        ModelService().create_model(dataset_id, "a", "b", training_slice_ids=["slice_missing"])
    training_classes = [
        ModelTrainClass(
            class_name="car",  # Use 'class_name', not 'class'
            annotation_type="box",
            ap=0.85
        )
    ]
    assert training_classes[0].model_dump(by_alias=True)["class"] == "car"
