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

// Shows one layer at a time of a chart that has a frame for each.
for (const player of document.querySelectorAll(".player")) {
  const frames = player.closest("figure").querySelectorAll(".step");
  const slider = player.querySelector("input");
  const button = player.querySelector("button");
  let playing = 0;
  const show = () => {
    frames.forEach((frame, layer) => frame.classList.toggle("on", layer === slider.valueAsNumber));
    slider.setAttribute("aria-valuetext", frames[slider.value].dataset.said);
  };
  const stop = () => {
    clearInterval(playing);
    playing = 0;
    button.textContent = "Play";
  };
  button.addEventListener("click", () => {
    if (playing) return stop();
    if (slider.value === slider.max) slider.value = 0;
    show();
    button.textContent = "Pause";
    playing = setInterval(() => {
      slider.stepUp();
      show();
      if (slider.value === slider.max) stop();
    }, 400);
  });
  slider.addEventListener("input", () => {
    stop();
    show();
  });
  show();
  player.hidden = false;
}
