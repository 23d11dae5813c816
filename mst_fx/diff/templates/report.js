"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const text = (index) => (index < 0 ? "" : data.texts[index]);
  // A row is [text before, text after, source, module, region, kept]; -1 is none.
  const [BEFORE, AFTER, SOURCE, PATH, REGION, KEPT] = [0, 1, 2, 3, 4, 5];
  const CONTEXT = 2;
  const SHORTEST_FOLD = 4;

  function element(tag, classes, ...children) {
    const made = document.createElement(tag);
    if (classes) made.className = classes;
    made.append(...children);
    return made;
  }

  // -- graphs ------------------------------------------------------------------------------------

  /** A button and what it hides, built when it is first opened. */
  class Fold {
    constructor(parent, label, build, classes = "") {
      this.button = element("button", `fold ${classes}`, ...label);
      this.button.type = "button";
      this.inside = element("div", classes ? "inner" : "");
      this.inside.hidden = true;
      this.button.setAttribute("aria-expanded", "false");
      this.button.addEventListener("click", () => this.set(this.inside.hidden));
      this.build = build;
      parent.append(this.button, this.inside);
    }

    set(open) {
      if (open && this.build) {
        this.build(this.inside);
        this.build = null;
      }
      this.inside.hidden = !open;
      this.button.setAttribute("aria-expanded", String(open));
    }
  }

  /** The rows of one layer, or of what is between layers; long unchanged runs are folded. */
  class Rows {
    constructor(rows, parent) {
      this.rows = rows;
      this.elements = [];
      this.folds = [];
      for (const [from, to, folded] of runs(rows)) {
        const build = (into) => {
          for (let i = from; i < to; i++) into.append((this.elements[i] = rowElement(rows[i])));
        };
        if (folded) this.folds.push([from, to, new Fold(parent, [`${to - from} unchanged nodes`], build)]);
        else build(parent);
      }
    }

    reveal(index) {
      for (const [from, to, fold] of this.folds) if (from <= index && index < to) fold.set(true);
      return this.elements[index];
    }
  }

  function runs(rows) {
    const found = [];
    let at = 0;
    while (at < rows.length) {
      let end = at;
      while (end < rows.length && rows[end][KEPT] === rows[at][KEPT]) end++;
      const from = at + (at > 0 ? CONTEXT : 0);
      const to = end - (end < rows.length ? CONTEXT : 0);
      if (rows[at][KEPT] && to - from >= SHORTEST_FOLD) {
        if (at < from) found.push([at, from, false]);
        found.push([from, to, true]);
        if (to < end) found.push([to, end, false]);
      } else {
        found.push([at, end, false]);
      }
      at = end;
    }
    return found;
  }

  /** A layer that repeats: the first one shown, the others behind folds. */
  class Block {
    constructor(block, parent) {
      this.block = block;
      this.views = [];
      this.itemFolds = [];
      const items = block.items;
      const show = (i, into) => (this.views[i] = new Rows(items[i].rows, into));
      if (items.length === 1 && !block.title) {
        show(0, parent);
        return;
      }
      const label = items.length > 1 ? [element("span", "times", `×${items.length}`), block.title] : [block.title];
      this.fold = new Fold(parent, label, (into) => {
        show(0, into);
        if (items.length === 1) return;
        const others = (inner) => {
          for (let i = 1; i < items.length; i++) {
            this.itemFolds[i] = new Fold(inner, [items[i].title], (deep) => show(i, deep), "repeat");
          }
        };
        const count = items.length - 1;
        this.others = new Fold(into, [count === 1 ? "1 more, equal" : `${count} more, equal`], others, "repeat");
      }, "layer");
      this.fold.set(true);
    }

    reveal(item, row) {
      if (this.fold) this.fold.set(true);
      if (item > 0) {
        this.others.set(true);
        this.itemFolds[item].set(true);
      }
      return this.views[item].reveal(row);
    }
  }

  function cell(index, classes) {
    const made = element("div", `cell ${index < 0 ? "" : classes}`);
    const line = text(index);
    const [name] = line.split(/: | = /, 1);
    if (name.length < line.length) made.append(element("b", "", name), line.slice(name.length));
    else made.append(line);
    return made;
  }

  function rowElement(row) {
    const made = element("div", row[KEPT] ? "row kept" : "row changed");
    made.append(cell(row[BEFORE], row[KEPT] ? "" : "gone"), cell(row[AFTER], row[KEPT] ? "" : "new"));
    made.tabIndex = -1;
    made.setAttribute("role", "button");
    made.setAttribute("aria-expanded", "false");
    made.title = text(row[SOURCE]);
    made.row = row;
    return made;
  }

  function panel(row) {
    const made = element("div", "panel");
    const place = [text(row[PATH]), text(row[SOURCE])].filter(Boolean).join(", ");
    if (row[REGION] < 0) {
      made.append(element("p", "muted", place || "no record of where this comes from"));
      return made;
    }
    const region = data.regions[row[REGION]];
    made.append(element("p", "", element("b", "", region.title), `  ${region.plan}`));
    made.append(element("p", "muted", [region.source, region.reason].filter(Boolean).join("; ")));
    if (row[SOURCE] >= 0 && text(row[SOURCE]) !== region.source) made.append(element("p", "muted", `this node: ${place}`));
    const body = data.bodies[region.body];
    if (!body) return made;
    const codes = element("div", "codes");
    for (const part of ["forward", "backward"]) {
      if (!body[part]) continue;
      const title = `${part} of body ${body.name}, for each chunk of C tokens`;
      const code = element("pre", "", body[part]);
      code.tabIndex = 0;
      codes.append(element("div", part, element("h4", "", title), code));
    }
    made.append(codes);
    return made;
  }

  function toggle(row, open = !row.classList.contains("open")) {
    if (open === row.classList.contains("open")) return;
    row.classList.toggle("open", open);
    row.setAttribute("aria-expanded", String(open));
    if (open) row.after(panel(row.row));
    else row.nextElementSibling.remove();
  }

  const root = document.getElementById("graphs");
  const views = data.graphs.map((graph, number) => {
    const box = element("div", "graph");
    const name = data.graphs.length > 1 ? `graph ${number + 1} ` : "";
    const titles = graph.same ? [`${name}as captured`, "unchanged"] : [`${name}before`, `${name}after`];
    box.append(element("div", "head", element("span", "before", titles[0]), element("span", "after", titles[1])));
    root.append(box);
    return graph.blocks.map((block) => new Block(block, box));
  });
  if (!views.length) root.append(element("p", "muted", "No graph was kept."));

  const STOPS = ".row, .fold";
  let stop = null;

  /** One element of the graphs is in the tab order; arrows move it. */
  function focusable(made) {
    if (stop && stop.classList.contains("row")) stop.tabIndex = -1;
    stop = made;
    made.tabIndex = 0;
  }

  const first = root.querySelector(".row.changed") || root.querySelector(".row");
  if (first) focusable(first);

  root.addEventListener("focusin", (event) => {
    const made = event.target.closest(STOPS);
    if (made === event.target) focusable(made);
  });
  root.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row && !String(getSelection())) {
      focusable(row);
      toggle(row);
    }
  });
  root.addEventListener("keydown", (event) => {
    const made = event.target;
    if (!made.matches(STOPS)) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const all = [...root.querySelectorAll(STOPS)].filter((e) => e.offsetParent);
      const next = all[all.indexOf(made) + (event.key === "ArrowDown" ? 1 : -1)];
      if (next) next.focus();
    } else if (made.matches(".row") && (event.key === "Enter" || event.key === " ")) {
      toggle(made);
    } else if (made.matches(".row") && event.key === "Escape") {
      toggle(made, false);
    } else {
      return;
    }
    event.preventDefault();
  });

  // -- finding -----------------------------------------------------------------------------------

  const index = [];
  data.graphs.forEach((graph, g) => graph.blocks.forEach((block, b) => block.items.forEach((item, i) => {
    item.rows.forEach((row, r) => index.push([row, g, b, i, r]));
  })));
  const query = document.getElementById("query");
  const matches = document.getElementById("matches");
  let found = [];
  let at = -1;

  function reveal([, g, b, i, r]) {
    const made = views[g][b].reveal(i, r);
    made.scrollIntoView({ block: "center" });
    return made;
  }

  function search() {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const known = new Map();
    const lower = (i) => {
      if (!known.has(i)) known.set(i, text(i).toLowerCase());
      return known.get(i);
    };
    const holds = ([row]) => {
      const all = [BEFORE, AFTER, SOURCE, PATH].map((k) => lower(row[k]));
      return words.every((word) => all.some((t) => t.includes(word)));
    };
    found = words.length ? index.filter(holds) : [];
    at = -1;
    go(1);
  }

  function go(step) {
    for (const old of root.querySelectorAll(".hit")) old.classList.remove("hit", "current");
    if (!found.length) {
      matches.textContent = query.value.trim() ? "no match" : "";
      return;
    }
    at = (at + step + found.length) % found.length;
    matches.textContent = `${at + 1} of ${found.length}`;
    const made = reveal(found[at]);
    made.classList.add("hit", "current");
    focusable(made);
  }

  let waiting = 0;
  query.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      waiting = 0;
      search();
    }, 120);
  });
  function advance(step) {
    if (waiting) {
      clearTimeout(waiting);
      waiting = 0;
      search();
    } else {
      go(step);
    }
  }
  query.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    advance(event.shiftKey ? -1 : 1);
  });
  document.getElementById("search").addEventListener("submit", (event) => {
    event.preventDefault();
    advance(1);
  });
  document.getElementById("previous").addEventListener("click", () => advance(-1));
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.matches("input")) {
      event.preventDefault();
      query.focus();
      query.select();
    }
  });
  for (const link of document.querySelectorAll("button[data-region]")) {
    link.addEventListener("click", () => {
      const entry = index.find(([row]) => row[REGION] === Number(link.dataset.region));
      if (!entry) return;
      const made = reveal(entry);
      toggle(made, true);
      made.focus({ preventScroll: true });
    });
  }

  // -- live bytes --------------------------------------------------------------------------------

  for (const figure of document.querySelectorAll(".timeline")) {
    const series = data.timelines[Number(figure.dataset.number)];
    const [left, bottom, width, height] = series.box;
    const cursor = figure.querySelector(".cursor");
    const tip = figure.querySelector(".tip");
    let share = -1;

    const last = (points, x) => {
      let low = 0;
      let high = points.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (points[middle][0] <= x) low = middle;
        else high = middle - 1;
      }
      return points[low];
    };
    const line = (name, point) => {
      const [, , bytes, phase, node, source, path] = point;
      const place = [phase, text(path), text(source)].filter(Boolean).join(", ");
      return element("div", "", element("b", name, `${name} ${bytes}`), element("span", "muted", place), element("code", "", text(node)));
    };
    const show = (x) => {
      share = Math.min(Math.max(x, 0), 1);
      cursor.hidden = tip.hidden = false;
      cursor.style.left = `${100 * (left + share * width)}%`;
      cursor.style.top = `${100 * (1 - bottom - height)}%`;
      cursor.style.height = `${100 * height}%`;
      tip.replaceChildren();
      for (const name of ["before", "after"]) if (series[name].length) tip.append(line(name, last(series[name], share)));
      tip.style.left = share < 0.5 ? `calc(${100 * (left + share * width)}% + 12px)` : "auto";
      tip.style.right = share < 0.5 ? "auto" : `calc(${100 * (1 - left - share * width)}% + 12px)`;
      tip.style.top = "12%";
    };
    const hide = () => {
      cursor.hidden = tip.hidden = true;
    };
    figure.addEventListener("pointermove", (event) => {
      const box = figure.querySelector("svg").getBoundingClientRect();
      show(((event.clientX - box.left) / box.width - left) / width);
    });
    figure.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    const stops = [...new Set([...series.before, ...series.after].map((point) => point[0]))].sort((a, b) => a - b);
    figure.addEventListener("keydown", (event) => {
      const target = {
        ArrowRight: () => stops.find((x) => x > share) ?? stops.at(-1),
        ArrowLeft: () => stops.findLast((x) => x < share) ?? stops[0],
        Home: () => stops[0],
        End: () => stops.at(-1),
      }[event.key];
      if (event.key === "Escape") hide();
      else if (target && stops.length) {
        event.preventDefault();
        show(target());
      }
    });
  }
})();
