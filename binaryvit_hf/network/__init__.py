"""
The binary network: every file that travels to the Hub with a checkpoint, and the image processor of this package.

- `configuration_binaryvit.py`: the config, one class for all rows of the paper's ablation.
- `modeling_binaryvit.py`: embeddings, attention, MLP, stages, and the model classes.
- `layers_binaryvit.py`: binary linear layers, batch normalisation of tokens, RPReLU, LayerScale, pooling.
- `functional_binaryvit.py`: differentiable functions: quantizers, batch normalisation over processes, fused steps.
- `packing_binaryvit.py`: packed weights: bits, their layer, and latent weights made from them.
- `quantization_binaryvit.py`: packed checkpoints: files and checks, quantizer of transformers, saving and upload.
- `engine_binaryvit.py`: which calls the compiled engine computes, and when it must read the weights again.
- `image_processing_binaryvit.py`: an image processor on the engine. Only checkpoints of earlier versions have a copy.

Input: `pixel_values` `(batch, channels, height, width)`, configs and checkpoints.
Output: logits, hidden states, and packed or latent checkpoints.

`save_pretrained` copies these files beside the weights. `trust_remote_code=True` loads them without this package, and
transformers finds them by their relative imports. So they import only each other, torch, transformers, safetensors and
huggingface_hub. Only `engine_binaryvit.py` and `functional_binaryvit.py` use the package, if it is installed: its compiled
code. The suffix `_binaryvit` marks files that travel or did.
"""
