"""The README's ten lines: a trained Vim, quantized to 4 bits, saved, loaded and run."""

import timm
import torch

import ptq4vm
import ptq4vm.models
from ptq4vm.data import calibration_batches, open_dataset, transform_for

model = timm.create_model("vim_nano_patch4_32", pretrained=True).eval()
images = calibration_batches(open_dataset("digits", "train", transform_for(model)), images=32, batch_size=32, seed=0)

config = ptq4vm.QuantConfig.w4a4(learning=ptq4vm.Learning(epochs=2))
prepared = ptq4vm.prepare(model, example_inputs=(images[0],), config=config)
ptq4vm.calibrate(prepared, images)
quantized = ptq4vm.convert(prepared)

ptq4vm.save(quantized, "vim-nano-w4a4")
quantized = ptq4vm.load("vim-nano-w4a4")
with torch.inference_mode():
    agreement = (quantized(images[0]).argmax(1) == model(images[0]).argmax(1)).float().mean()
print(f"{agreement:.0%} of the predictions agree with floating point")
