// Names of marks as a tooltip for mouse, touch and keyboard. Without this the browser shows them.
(() => {
  "use strict";
  const tip = document.getElementById("tip");
  let shown = null;

  for (const title of document.querySelectorAll("svg title")) {
    const mark = title.parentElement;
    mark.dataset.tip = title.textContent;
    mark.setAttribute("aria-label", title.textContent.replaceAll("\n", ", "));
    title.remove();
  }

  const hide = () => {
    if (shown) shown.classList.remove("shown");
    shown = null;
    tip.hidden = true;
  };

  const place = (mark) => {
    const box = mark.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth - size.width - 8;
    const left = Math.min(box.left + box.width / 2 - size.width / 2, room);
    const above = box.top - size.height - 8;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${above >= 8 ? above : box.bottom + 8}px`;
  };

  const show = (mark) => {
    if (mark === shown) return;
    hide();
    if (!mark) return;
    shown = mark;
    mark.classList.add("shown");
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    place(mark);
  };

  const marked = (event) =>
    event.target instanceof Element ? event.target.closest("[data-tip]") : null;

  document.addEventListener("pointerover", (event) => show(marked(event)));
  document.addEventListener("pointerdown", (event) => show(marked(event)));
  document.addEventListener("pointerout", (event) => {
    if (event.pointerType === "mouse") hide();
  });
  document.addEventListener("focusin", (event) => show(marked(event)));
  document.addEventListener("focusout", hide);
  // A finger that scrolls takes the marks from under what names them; focus follows its mark.
  document.addEventListener(
    "scroll",
    () => {
      if (shown && shown === document.activeElement) place(shown);
      else hide();
    },
    { capture: true, passive: true },
  );

  const nearest = (row, mark) => {
    const centre = (one) => one.getBoundingClientRect().left + one.getBoundingClientRect().width / 2;
    const here = centre(mark);
    const far = (one) => Math.abs(centre(one) - here);
    return row.reduce((best, one) => (far(one) < far(best) ? one : best));
  };

  const target = (key, rows, row, column) => {
    const line = rows[row];
    if (key === "ArrowRight") return line[column + 1];
    if (key === "ArrowLeft") return line[column - 1];
    if (key === "Home") return line[0];
    if (key === "End") return line[line.length - 1];
    const next = rows[row + { ArrowDown: 1, ArrowUp: -1 }[key]];
    return next && nearest(next, line[column]);
  };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const cell = event.target instanceof Element && event.target.closest("[role=gridcell]");
    if (!cell || event.ctrlKey || event.altKey || event.metaKey) return;
    const known = ["ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown", "Home", "End"];
    if (!known.includes(event.key)) return;
    const grid = cell.closest("[role=grid]");
    const rows = [...grid.querySelectorAll("[role=row]")].map((row) => [
      ...row.querySelectorAll("[role=gridcell]"),
    ]);
    const row = rows.findIndex((line) => line.includes(cell));
    const next = target(event.key, rows, row, rows[row].indexOf(cell));
    event.preventDefault();
    if (!next) return;
    cell.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
})();
