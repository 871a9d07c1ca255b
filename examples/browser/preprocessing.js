// Pictures as a model sees them: Pillow's antialiased resize, the centre, normalized; float32 (3, H, W).

export const LARGEST = 50e6; // pixels of a picture

const FILTERS = {
  bilinear: [1, (x) => (x < 1 ? 1 - x : 0)],
  bicubic: [2, (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0)],
};

// Weights of the pixels that a pixel of a shorter or longer row is made of, as [first, weights].
function weightsOf(from, to, interpolation) {
  const [radius, filter] = FILTERS[interpolation];
  const scale = from / to, wide = Math.max(scale, 1), support = radius * wide;
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - support + 0.5));
    const last = Math.min(from, Math.floor(centre + support + 0.5));
    const weights = Array.from({ length: last - first }, (_, i) => filter(Math.abs((first + i - centre + 0.5) / wide)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((weight) => weight / sum)];
  });
}

// Resizes the rows of RGBA pixels; each result is rounded to a byte, as Pillow does between its two passes.
function resizeRows(pixels, from, to, rows, interpolation) {
  const made = new Uint8ClampedArray(4 * to * rows);
  weightsOf(from, to, interpolation).forEach(([first, weights], x) => {
    for (let y = 0; y < rows; y++) {
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let i = 0, at = 4 * (y * from + first) + c; i < weights.length; i++, at += 4) sum += weights[i] * pixels[at];
        made[4 * (y * to + x) + c] = Math.floor(sum + 0.5);
      }
    }
  });
  return made;
}

function transpose(pixels, width, height) {
  const source = new Uint32Array(pixels.buffer, pixels.byteOffset, width * height), made = new Uint32Array(width * height);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) made[x * height + y] = source[y * width + x];
  return new Uint8ClampedArray(made.buffer);
}

export function resize(image, width, height, interpolation) {
  let { data } = image;
  if (width !== image.width) data = resizeRows(data, image.width, width, image.height, interpolation);
  if (height !== image.height) {
    data = transpose(data, width, image.height);
    data = transpose(resizeRows(data, image.height, height, width, interpolation), height, width);
  }
  return { data, width, height };
}

// Half to even, as Python rounds.
const round = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

export function prepare(image, settings) {
  const [, height, width] = settings.input_size;
  const mode = settings.crop_mode ?? "center";
  if (!(settings.interpolation in FILTERS)) throw new Error(`the page does not know the interpolation ${settings.interpolation}`);
  if (mode !== "squash" && (mode !== "center" || width !== height)) throw new Error(`the page does not know the crop mode ${mode} for ${width} × ${height} pixels`);
  const target = [width, height].map((side) => Math.floor(side / settings.crop_pct));
  const short = Math.min(image.width, image.height);
  const size = mode === "squash" ? target : [image.width, image.height].map((side) => Math.floor((target[0] * side) / short));
  if (size[0] * size[1] > LARGEST) throw new Error(`${image.width} × ${image.height} pixels are too long a strip`);
  const resized = resize(image, ...size, settings.interpolation);
  const left = round((resized.width - width) / 2), top = round((resized.height - height) / 2);
  const made = new Float32Array(3 * height * width);
  for (let c = 0, to = 0; c < 3; c++) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++, to++) {
        made[to] = (resized.data[4 * ((top + y) * resized.width + left + x) + c] / 255 - settings.mean[c]) / settings.std[c];
      }
    }
  }
  return made;
}
