// Shows at once, and on touch, what browsers show of a mark's <title> only after a while.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true");
document.body.append(tip);
for (const title of document.querySelectorAll("figure svg title")) {
  title.parentElement.dataset.tip = title.textContent;
  title.remove();
}
document.addEventListener("pointerover", (event) => {
  const said = event.target.closest("[data-tip]")?.dataset.tip;
  tip.hidden = !said;
  if (!said) return;
  tip.textContent = said;
  const at = event.target.getBoundingClientRect();
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(room, at.x + at.width / 2 - tip.offsetWidth / 2))}px`;
  tip.style.top = `${at.y - tip.offsetHeight - 8 < 0 ? at.bottom + 8 : at.y - tip.offsetHeight - 8}px`;
});
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
