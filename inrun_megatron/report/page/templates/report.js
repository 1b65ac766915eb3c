"use strict";
(() => {
  const { charts, themes } = JSON.parse(document.getElementById("charts").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const state = { theme: "auto", dark: matchMedia("(prefers-color-scheme: dark)") };

  // Charts: one place per slot and target; the chart in it follows phase and measure.
  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value ?? null;
  const mode = () => (state.theme === "auto" ? (state.dark.matches ? "dark" : "light") : state.theme);

  function chartFor(place) {
    const phase = chosen("phase"), measure = chosen("measure");
    return Object.values(charts).find((chart) =>
      chart.slot === place.dataset.slot && (chart.target ?? undefined) === place.dataset.target &&
      (chart.phase === null || phase === null || chart.phase === phase) &&
      (chart.measure === null || chart.measure === measure));
  }

  async function draw(place) {
    if (place.offsetParent === null) return; // its target is not shown; drawn when it is
    const chart = chartFor(place);
    const name = chart ? `${chart.name}|${mode()}` : "";
    if (place.dataset.drawn === name) return;
    place.dataset.drawn = name;
    place.view?.finalize();
    if (!chart) { place.textContent = "No figures in these steps."; return; }
    place.view = await vegaEmbed(place, chart.spec, {
      config: themes[mode()], renderer: "svg", tooltip: { theme: mode() }, downloadFileName: chart.name,
      actions: { export: true, source: false, compiled: false, editor: false },
    });
  }

  function refresh() {
    document.documentElement.dataset.theme = mode();
    const targets = all('input[name="target"]');
    const shown = new Set(targets.filter((box) => box.checked).map((box) => box.value));
    for (const card of all("[data-target-card]")) card.hidden = targets.length > 0 && !shown.has(card.dataset.targetCard);
    const phase = document.querySelector('input[name="phase"]:checked');
    const label = phase ? `${phase.value[0].toUpperCase()}${phase.value.slice(1)}: ${phase.parentElement.title}` : "Whole run";
    for (const place of all("[data-phase-label]")) place.textContent = label;
    for (const place of all("[data-measure-label]")) place.textContent = chosen("measure") === "nats" ? "in nats per token of the target" : "normalised";
    for (const text of all("[data-measure]")) text.hidden = text.dataset.measure !== chosen("measure");
    return Promise.all(all(".chart").map(draw));
  }

  // Theme: as the system has it, or as chosen. A page opened from a file may have no storage.
  const stored = (value) => {
    try { return value === undefined ? localStorage.getItem("inrun-theme") : localStorage.setItem("inrun-theme", value); } catch { return null; }
  };
  const button = document.getElementById("theme");
  const setTheme = (theme) => { state.theme = theme; button.textContent = `Theme: ${theme}`; };
  const order = ["auto", "light", "dark"];
  setTheme(order.includes(stored()) ? stored() : "auto");
  button.addEventListener("click", () => {
    setTheme(order[(order.indexOf(state.theme) + 1) % 3]);
    stored(state.theme);
    refresh();
  });
  state.dark.addEventListener("change", refresh);
  for (const input of all(".bar input")) input.addEventListener("change", refresh);

  // Documents: search, lists, sort.
  const table = document.getElementById("document-table");
  if (table) {
    const body = table.tBodies[0], rows = [...body.rows], heads = all("th", table);
    const search = document.getElementById("search"), list = document.getElementById("list"), domain = document.getElementById("domain");
    // What a document is and says; not the names of targets beside its values.
    const words = (row) => [row.cells[0], ...all("pre, .about dd", row)].map((place) => place.textContent).join(" ").toLowerCase();
    const texts = new Map(rows.map((row) => [row, words(row)]));

    const sort = (column, descending) => {
      const number = heads[column].dataset.type === "number";
      const key = (row) => row.cells[column].dataset.sort;
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (number && (x === "" || y === "")) return (x === "") - (y === ""); // rows without a figure come last
        return (number ? x - y : x.localeCompare(y)) * (descending ? -1 : 1);
      });
      heads.forEach((head, index) => index === column ? head.setAttribute("aria-sort", descending ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
      body.append(...rows);
    };
    const filter = () => {
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const fits = wanted.every((word) => texts.get(row).includes(word)) &&
          (!list.value || row.dataset.marks.split(" ").includes(list.value)) && (!domain.value || row.dataset.domain === domain.value);
        row.hidden = !fits;
        shown += fits;
      }
      document.getElementById("count").textContent = `${shown} of ${rows.length} documents`;
      document.getElementById("none").hidden = shown > 0;
    };
    const showList = () => {
      if (list.value) sort(1 + Number(list.value.slice(1)), list.value[0] === "b");
      filter();
    };
    heads.forEach((head, index) => head.firstElementChild.addEventListener("click", () => sort(index, head.getAttribute("aria-sort") !== "descending" && head.dataset.type === "number" || head.getAttribute("aria-sort") === "ascending")));
    search.addEventListener("input", filter);
    domain.addEventListener("change", filter);
    list.addEventListener("change", showList);
    showList();
  }

  // The bar marks the section in view.
  const links = new Map(all(".links a").map((link) => [link.getAttribute("href").slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of all("main section")) watch.observe(section);

  refresh().then(() => { document.documentElement.dataset.ready = "true"; });
})();
