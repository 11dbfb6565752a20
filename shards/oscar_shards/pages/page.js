"use strict";
// The contact sheet's filters. Their state lives in the address (#tag=dog&score=0.4), so that a page opens filtered.
// Everything shown is in the document already; here classes are set and nothing is ever parsed as HTML.

const one = (query, from = document) => from.querySelector(query);
const all = (query, from = document) => [...from.querySelectorAll(query)];

function readFigure(node) {
  const labels = all(".label", node);
  const regions = all("rect", node).map((rect, n) => ({
    rect, label: labels[n], tag: rect.dataset.tag.toLowerCase(),
    score: "score" in rect.dataset ? Number(rect.dataset.score) : Infinity, // none was stored: no slider hides it
  }));
  const text = (one(".key", node).textContent + " " + one(".texts", node).textContent).toLowerCase();
  return { node, regions, text, chips: all(".chip", node) };
}

function startSheet(sheet) {
  const field = Object.fromEntries(["tag", "score", "text", "labels"].map((id) => [id, one(`#${id}`)]));
  const initial = { tag: field.tag.value, score: field.score.value, text: "", labels: "1" };
  const figures = all("figure", sheet).map(readFigure);
  const known = new Set(figures.flatMap((figure) => figure.regions.map((region) => region.tag)));
  const total = figures.reduce((sum, figure) => sum + figure.regions.length, 0);

  const state = () => ({
    tag: field.tag.value.trim(), score: field.score.value, text: field.text.value.trim(), labels: field.labels.checked ? "1" : "0",
  });

  function show() {
    const now = state(), tag = now.tag.toLowerCase(), least = Number(now.score), text = now.text.toLowerCase();
    const fits = !tag ? () => true : known.has(tag) ? (name) => name === tag : (name) => name.includes(tag);
    let images = 0, boxes = 0;
    for (const { node, regions, text: own, chips } of figures) {
      const seen = new Set();
      let drawn = 0;
      for (const { rect, label, tag: name, score } of regions) {
        const off = score < least, dim = !off && !fits(name);
        for (const part of [rect, label]) { part.classList.toggle("off", off); part.classList.toggle("dim", dim); }
        if (!off) seen.add(name);
        if (!off && !dim) drawn++;
      }
      for (const chip of chips) chip.classList.toggle("faint", !seen.has(chip.dataset.tag.toLowerCase()));
      node.hidden = (tag !== "" && !drawn) || !own.includes(text);
      if (!node.hidden) { images++; boxes += drawn; }
    }
    document.body.classList.toggle("bare", now.labels === "0");
    document.body.classList.toggle("filtered", tag !== "");
    one("#least").textContent = least.toFixed(2);
    one("#count").textContent = `showing ${images} of ${figures.length} images, ${boxes} of ${total} boxes`;
    one("#nothing").hidden = images > 0;
  }

  function fromAddress() {
    const said = new URLSearchParams(location.hash.slice(1));
    const value = (name) => said.get(name) ?? initial[name];
    field.tag.value = value("tag");
    field.score.value = value("score");
    field.text.value = value("text");
    field.labels.checked = value("labels") !== "0";
    show();
  }

  function toAddress() {
    const changed = Object.entries(state()).filter(([name, value]) => value !== initial[name]);
    history.replaceState(null, "", "#" + new URLSearchParams(changed));
    show();
  }

  function wanted(tag) {
    field.tag.value = field.tag.value.trim().toLowerCase() === tag.toLowerCase() ? "" : tag;
    toAddress();
  }

  one("#tools").addEventListener("input", toAddress);
  one("#tools").addEventListener("submit", (event) => event.preventDefault());
  one("#reset").addEventListener("click", () => { history.replaceState(null, "", "#"); fromAddress(); });
  addEventListener("hashchange", fromAddress);
  startDialog(figures, wanted);
  fromAddress();
}

function startDialog(figures, wanted) {
  const dialog = one("#large"), place = one(".place", dialog);
  let current = 0;

  function open(number) {
    current = number;
    place.replaceChildren(...[...figures[number].node.children].map((child) => child.cloneNode(true)));
    if (!dialog.open) dialog.showModal();
  }

  function step(by) {
    const shown = figures.map((_, n) => n).filter((n) => !figures[n].node.hidden);
    open(shown[(shown.indexOf(current) + by + shown.length) % shown.length]);
  }

  document.addEventListener("click", (event) => {
    const chip = event.target.closest(".chip"), frame = event.target.closest(".sheet .frame");
    if (chip) { dialog.close(); wanted(chip.dataset.tag); }
    else if (frame) open(figures.findIndex((figure) => figure.node.contains(frame)));
    else if (event.target === dialog) dialog.close(); // the backdrop
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches(".sheet .frame")) event.target.click();
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && dialog.open) step(by);
  });
  one("#close").addEventListener("click", () => dialog.close());
  one("#before").addEventListener("click", () => step(-1));
  one("#after").addEventListener("click", () => step(1));
}

function pick(photo, chosen) {
  const rects = all("rect", photo), labels = all(".label", photo);
  rects.forEach((rect, n) => {
    rect.classList.toggle("hot", chosen(rect));
    labels[n].classList.toggle("hot", chosen(rect));
  });
  photo.classList.toggle("picking", rects.some(chosen));
}

// The smallest box under the pointer is meant: others may lie over it.
function boxAt(photo, x, y) {
  let best = null, least = Infinity;
  for (const rect of all("rect:not(.off)", photo)) {
    const at = rect.getBoundingClientRect();
    const inside = at.left <= x && x <= at.right && at.top <= y && y <= at.bottom;
    if (inside && at.width * at.height < least) [best, least] = [rect, at.width * at.height];
  }
  return best;
}

function startHover() {
  document.addEventListener("pointermove", (event) => {
    const photo = event.target.closest(".photo");
    if (!photo) return;
    const rect = boxAt(photo, event.clientX, event.clientY);
    photo.title = rect ? rect.getAttribute("aria-label") : "";
    pick(photo, (other) => other === rect);
  });
  document.addEventListener("pointerover", (event) => {
    const chip = event.target.closest(".chip");
    if (chip) pick(one(".photo", chip.closest("figure, .place")), (rect) => rect.dataset.tag === chip.dataset.tag);
  });
  document.addEventListener("pointerout", (event) => {
    const left = event.target.closest(".chip, .photo");
    if (left && !left.contains(event.relatedTarget)) pick(one(".photo", left.closest("figure, .place")), () => false);
  });
}

const sheet = one(".sheet");
if (sheet) { startSheet(sheet); startHover(); }
