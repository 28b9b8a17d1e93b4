"use strict";
const $ = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const data = JSON.parse($("#data").textContent);
let budget = data.budgets.at(-1);

function words(numbers) {
  return Object.entries(numbers).map(([name, value]) => `${name} ${value}`).join(" · ");
}

// The slider over numbers of tokens: all pictures and their numbers follow.
function show(chosen) {
  budget = chosen;
  for (const image of all(".gallery .stack img")) {
    image.classList.toggle("shown", image.dataset.tokens === budget || image.dataset.only === "");
  }
  for (const figure of all("figure[data-number]")) {
    const own = data.values[figure.dataset.number] || {};
    $(".value", figure).textContent = figure.dataset.fixed || words(own[budget] || {});
  }
  const output = $("#chosen");
  if (output) output.textContent = data.labels[budget];
  if ($("#zoom").open) place();
}

const slider = $("#budget");
if (slider) {
  slider.addEventListener("input", () => {
    show(data.budgets[slider.value]);
    history.replaceState(null, "", `#tokens=${budget}`);
  });
}
function fromAddress() {
  const asked = location.hash.match(/^#tokens=(\d+)$/);
  const place = asked ? data.budgets.indexOf(asked[1]) : -1;
  if (place >= 0 && slider) slider.value = place;
  if (place >= 0) show(data.budgets[place]);
}
addEventListener("hashchange", fromAddress);

// Tabs: each button shows the parts with its name.
for (const tabs of all(".tabs")) {
  for (const button of all("button", tabs)) {
    button.addEventListener("click", () => {
      for (const other of all("button", tabs)) {
        other.setAttribute("aria-selected", other === button);
        for (const part of all(`[data-tab="${other.dataset.opens}"]`)) part.hidden = other !== button;
      }
    });
  }
}

// Zoom: one pair on the whole screen, with a divider between original and reconstruction.
let open = null, scale = 0, apart = false;
const figures = all("figure[data-number]");
function place() {
  const box = $("#zoom .wipe"), [under, over] = all("img", box);
  under.src = $(".original", open).src;
  const chosen = $(".stack img.shown", open);
  over.src = chosen.src;
  const stage = $("#zoom .stage"), wide = under.naturalWidth, tall = under.naturalHeight;
  const fit = Math.max(Math.min(stage.clientWidth / wide, stage.clientHeight / tall), .05);
  const factor = scale || (fit > 1 ? Math.floor(fit) : fit);
  box.style.width = `${wide * factor}px`;
  box.style.height = `${tall * factor}px`;
  box.classList.toggle("apart", apart);
  over.style.clipPath = apart ? "" : `inset(0 0 0 ${$("#wipe").value}%)`;
  $("#wipe").disabled = apart;
  $("#apart").setAttribute("aria-pressed", apart);
  $("#larger").textContent = scale ? `${scale}×` : "fit";
  $("#zoom .top span").textContent = `${open.dataset.key} · ${$(".value", open).textContent}`;
}
for (const figure of figures) {
  $(".triple", figure).addEventListener("click", () => {
    open = figure;
    scale = 0;
    $("#zoom").showModal();
    place();
  });
}
function step(by) {
  const seen = figures.filter((figure) => figure.offsetParent !== null);
  open = seen[(seen.indexOf(open) + by + seen.length) % seen.length];
  place();
}
$("#wipe").addEventListener("input", place);
$("#apart").addEventListener("click", () => { apart = !apart; place(); });
$("#larger").addEventListener("click", () => { scale = { 0: 2, 2: 4, 4: 8, 8: 0 }[scale]; place(); });
$("#previous").addEventListener("click", () => step(-1));
$("#next").addEventListener("click", () => step(1));
$("#close").addEventListener("click", () => $("#zoom").close());
addEventListener("keydown", (event) => {
  if (!$("#zoom").open || event.target.id === "wipe") return;
  if (event.key === "ArrowRight") step(1);
  if (event.key === "ArrowLeft") step(-1);
});
addEventListener("resize", () => { if ($("#zoom").open) place(); });
show(budget);
fromAddress();
document.documentElement.dataset.ready = "yes";
