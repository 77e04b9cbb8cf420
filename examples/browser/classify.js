// Loads a network, shows it the pictures that are dropped, and writes what it answers onto the page.
//
// What the network wants to see stands in a JSON file, which prepare.py writes into networks/: index.html?network=NAME

const RUNTIME = "./node_modules/onnxruntime-web/dist/";
const SHOWN = 5;
const FRACTION_BITS = 22;

const element = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
const seconds = (since) => (performance.now() - since) / 1000;

function say(text, wrong = false) {
  element("status").textContent = text;
  element("status").classList.toggle("wrong", wrong);
}

async function fetched(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address} is not there (status ${response.status}): see the README`);
  return response;
}

// For every position of a side that is brought from `from` to `to` pixels: where it looks, and with which weights, as
// Pillow's bilinear filter does: a triangle, as wide as a step where the picture shrinks, in integers.
function looks(from, to) {
  const step = from / to;
  const reach = Math.max(step, 1);
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * step;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const last = Math.min(Math.trunc(centre + reach + 0.5), from);
    const weights = [];
    for (let x = first; x < last; x++) weights.push(Math.max(1 - Math.abs(x - centre + 0.5) / reach, 0));
    const sum = weights.reduce((one, other) => one + other, 0);
    return { first, weights: weights.map((weight) => Math.floor((weight / sum) * 2 ** FRACTION_BITS + 0.5)) };
  });
}

// Brings the rows (or with `down` the columns) of a picture of bytes, three per pixel, to another length.
function resizeSide({ width, height, bytes }, to, down) {
  const from = down ? height : width;
  if (from === to) return { width, height, bytes };
  const size = down ? { width, height: to } : { width: to, height };
  const result = new Uint8Array(size.width * size.height * 3);
  const stride = down ? width * 3 : 3;
  looks(from, to).forEach(({ first, weights }, place) => {
    for (let other = 0; other < (down ? width : height); other++) {
      for (let colour = 0; colour < 3; colour++) {
        let at = (down ? other * 3 : other * width * 3) + first * stride + colour;
        let sum = 2 ** (FRACTION_BITS - 1);
        for (const weight of weights) {
          sum += bytes[at] * weight;
          at += stride;
        }
        const pixel = down ? place * width + other : other * to + place;
        result[pixel * 3 + colour] = Math.min(Math.max(Math.floor(sum / 2 ** FRACTION_BITS), 0), 255);
      }
    }
  });
  return { ...size, bytes: result };
}

// The decoded pixels of a picture, upright, without their transparency.
async function decode(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const bytes = new Uint8Array(width * height * 3);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let colour = 0; colour < 3; colour++) bytes[pixel * 3 + colour] = data[pixel * 4 + colour];
  }
  return { width, height, bytes };
}

// Rounds halves to the even number, as Python does.
function round(value) {
  const low = Math.floor(value);
  return value - low === 0.5 ? low + (low % 2) : Math.round(value);
}

// What the network sees of a picture: short side to `resize`, the square in the middle, less the mean of each colour, by
// its standard deviation; the colours one after the other.
function seen(picture, { resize, image_size: size, mean, std }) {
  const { width, height } = picture;
  const long = Math.trunc((resize * Math.max(width, height)) / Math.min(width, height));
  const [wide, high] = width <= height ? [resize, long] : [long, resize];
  const { bytes } = resizeSide(resizeSide(picture, wide, false), high, true);
  const [left, top] = [round((wide - size) / 2), round((high - size) / 2)];
  const values = new Float32Array(3 * size * size);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      for (let colour = 0; colour < 3; colour++) {
        const value = bytes[((top + y) * wide + left + x) * 3 + colour] / 255;
        values[(colour * size + y) * size + x] = (value - mean[colour]) / std[colour];
      }
    }
  }
  return values;
}

function shares(logits) {
  const highest = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - highest));
  const sum = powers.reduce((one, other) => one + other, 0);
  return powers.map((power) => power / sum);
}

function show(logits, classes) {
  const ranked = shares(logits).map((share, place) => ({ share, name: classes[place] ?? `class ${place}` }));
  ranked.sort((one, other) => other.share - one.share);
  element("answers").replaceChildren(
    ...ranked.slice(0, SHOWN).map(({ share, name }) => {
      const item = document.createElement("li");
      item.style.setProperty("--share", `${100 * share}%`);
      for (const [text, kind] of [[name, "name"], [`${(100 * share).toFixed(1)} %`, "share"]]) {
        const part = document.createElement("span");
        part.textContent = text;
        part.className = kind;
        item.append(part);
      }
      return item;
    }),
  );
  element("logits").textContent = JSON.stringify(Array.from(logits));
}

class Network {
  static async load(address) {
    let ort;
    try {
      ort = await import(`${RUNTIME}ort.wasm.min.mjs`);
    } catch {
      throw new Error("onnxruntime-web is not there: run npm install in this folder, and serve it");
    }
    ort.env.wasm.wasmPaths = new URL(RUNTIME, import.meta.url).href;
    ort.env.wasm.numThreads = 1; // more need headers that plain servers do not send
    const here = new URL(address, document.baseURI);
    const about = await (await fetched(here)).json();
    const begun = performance.now();
    const bytes = new Uint8Array(await (await fetched(new URL(about.model, here))).arrayBuffer());
    const arrived = seconds(begun);
    const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    return Object.assign(new Network(), { ort, about, session, here, bytes: bytes.length, arrived, loaded: seconds(begun) });
  }

  async answer(blob) {
    const begun = performance.now();
    const { image_size: size } = this.about;
    const values = seen(await decode(blob), this.about);
    const prepared = seconds(begun);
    const images = new this.ort.Tensor("float32", values, [1, 3, size, size]);
    const results = await this.session.run({ [this.session.inputNames[0]]: images });
    return { logits: results[this.session.outputNames[0]].data, prepared, computed: seconds(begun) - prepared };
  }
}

function picturesFrom(network) {
  const zone = element("drop");
  let newest = 0;

  async function take(blob) {
    const own = ++newest;
    document.body.dataset.state = "busy";
    say("Thinking");
    try {
      const picture = element("picture");
      URL.revokeObjectURL(picture.src);
      picture.src = URL.createObjectURL(blob);
      picture.hidden = false;
      picture.alt = blob.name ?? "the picture";
      element("invitation").hidden = true;
      element("hint").textContent = "Drop another one, or click to choose it";
      const { logits, prepared, computed } = await network.answer(blob);
      if (own !== newest) return; // another picture was dropped meanwhile
      show(logits, network.about.classes);
      say(
        `${megabytes(network.bytes)} of network, ready after ${network.loaded.toFixed(2)} s. ` +
          `This picture: ${(1000 * prepared).toFixed(0)} ms to prepare, ${(1000 * computed).toFixed(0)} ms to answer.`,
      );
      document.body.dataset.state = "answered";
    } catch (error) {
      if (own !== newest) return;
      element("answers").replaceChildren();
      say(`This cannot be read as a picture (${error.message})`, true);
      document.body.dataset.state = "failed";
    }
  }

  element("file").addEventListener("change", (event) => event.target.files.length && take(event.target.files[0]));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault(); // wherever it is dropped: the browser would leave the page to show it
      zone.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    });
  }
  document.addEventListener("drop", (event) => event.dataTransfer.files.length && take(event.dataTransfer.files[0]));
  for (const name of network.about.samples ?? []) {
    const address = new URL(name, network.here);
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.src = address;
    image.alt = `example ${name}`;
    button.append(image);
    button.addEventListener("click", async () => take(await (await fetched(address)).blob()));
    element("samples").append(button);
    element("samples").hidden = false;
  }
}

try {
  const network = await Network.load(`./networks/${new URLSearchParams(location.search).get("network") ?? "model"}.json`);
  element("about").textContent =
    `${network.about.arch} for ${network.about.classes.length.toLocaleString("en")} classes, ` +
    `${megabytes(network.bytes)}. Pictures stay on this device: the network comes to them.`;
  picturesFrom(network);
  say(`Ready after ${network.loaded.toFixed(2)} s, ${network.arrived.toFixed(2)} s of them for loading the network.`);
  document.body.dataset.state = "ready";
} catch (error) {
  say(error.message, true);
  document.body.dataset.state = "failed";
}
