import os


# Before any Hugging Face import: the tests must not reach for a network, nor read the user's own cache of models.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Tests run two at a time, on as few as two cores; threads that spin while they wait would take them from each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
