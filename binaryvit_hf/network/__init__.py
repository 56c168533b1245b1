"""
The binary network: every file that travels to the Hub with a checkpoint, and nothing else.

- `configuration_binaryvit.py`: the config, one class for all rows of the paper's ablation, with a range for every
  field.
- `modeling_binaryvit.py`: embeddings, attention, MLP, stages, and the model classes.
- `layers_binaryvit.py`: binary linear layers and convolutions, batch normalisation of tokens, RPReLU, LayerScale,
  pooling.
- `functional_binaryvit.py`: differentiable functions: quantizers with their gradients, and fused steps.
- `quantization_binaryvit.py`: packed weights: their format, files and checks, and the quantizer of transformers.
- `engine_binaryvit.py`: which calls the compiled engine computes, and when it must read the weights anew.

Enters: `pixel_values (batch, channels, height, width)`, configs and checkpoints. Leaves: logits, hidden states, packed
files.

`save_pretrained` copies these files beside the weights, where `trust_remote_code=True` loads them without this
package. transformers finds them by their relative imports. So they import only each other, torch, transformers,
safetensors and huggingface_hub. `engine_binaryvit.py` uses `binaryvit_hf.engine` where the package is installed. The
name's ending `_binaryvit` marks a file that travels.
"""
