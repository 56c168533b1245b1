import os


# Before any Hugging Face import: the tests must not reach for a network, nor read the user's own cache of models.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
