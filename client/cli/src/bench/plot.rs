//! Charts as SVG: bars beside each other, and lines, each axis linear or logarithmic. Pure: numbers in, text out.
//!
//! A chart brings its own style, legible on light and on dark ground, and loads nothing.

use std::fmt::Write;

/// Size of a chart, and of the margins around its plot.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 78.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 62.0;
const BOTTOM: f64 = 52.0;
/// Colours there are; the next ones begin anew.
const COLOURS: usize = 6;
/// Most ticks of a linear axis, about.
const TICKS: f64 = 6.0;
/// Room of one letter.
const LETTER: f64 = 6.6;
/// How far the names of groups lean, in degrees, where there is no room for them side by side.
const LEAN: f64 = 50.0;

/// How every chart looks. Colours with enough contrast on white and on near-black.
const STYLE: &str = "<style>.plot{font:12px system-ui,sans-serif;max-width:100%;height:auto;color:#1d2126;background:#fff}\
.plot text{fill:currentColor}.plot .title{font-size:15px;font-weight:600}.plot .grid{stroke:currentColor;stroke-opacity:.18}\
.plot .axis{stroke:currentColor;stroke-opacity:.7}.plot .line{fill:none;stroke-width:2}\
.plot .f0{fill:#2f7ed8}.plot .f1{fill:#d9622b}.plot .f2{fill:#2e9e5b}.plot .f3{fill:#b0489c}.plot .f4{fill:#a98600}.plot .f5{fill:#6d7480}\
.plot .s0{stroke:#2f7ed8}.plot .s1{stroke:#d9622b}.plot .s2{stroke:#2e9e5b}.plot .s3{stroke:#b0489c}.plot .s4{stroke:#a98600}.plot .s5{stroke:#6d7480}\
@media (prefers-color-scheme:dark){.plot{color:#e6e8eb;background:#16191d}}</style>";

/// One axis.
#[derive(Clone, Debug, Default)]
pub struct Axis {
    /// What it is, with the unit.
    pub name: String,
    /// Whether equal ratios are equally far from each other. What is not positive stands at its beginning then.
    pub log: bool,
    /// Where it is marked and with which words; if empty, where numbers are round.
    pub marks: Vec<(f64, String)>,
}

impl Axis {
    /// A linear axis.
    pub fn linear(name: &str) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// A logarithmic axis.
    pub fn log(name: &str) -> Self {
        Self { name: name.into(), log: true, ..Self::default() }
    }
}

/// One line of a chart, or the bars of one colour.
#[derive(Clone, Debug)]
pub struct Series {
    /// What it is.
    pub name: String,
    /// Its points. Of bars only the second number counts: the height in the group of the same place.
    pub points: Vec<(f64, f64)>,
}

/// An axis with its ends, on a stretch of the chart.
struct Scale {
    log: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    marks: Vec<(f64, String)>,
}

impl Scale {
    fn new(axis: &Axis, values: impl Iterator<Item = f64>, (from, to): (f64, f64)) -> Self {
        let values: Vec<f64> = values.filter(|value| value.is_finite() && (!axis.log || *value > 0.0)).collect();
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = match (values.is_empty(), axis.log) {
            (true, false) => (0.0, 1.0),
            (true, true) => (1.0, 10.0),
            (false, false) => (least.min(0.0), if most > least.min(0.0) { most } else { least.min(0.0) + 1.0 }),
            (false, true) => {
                let (low, high) = (10_f64.powf(least.log10().floor()), 10_f64.powf(most.log10().ceil()));
                (low, if high > low { high } else { low * 10.0 })
            }
        };
        let (high, marks) = match (axis.marks.is_empty(), axis.log) {
            (false, _) => (high, axis.marks.clone()),
            (true, true) => (high, decades(low, high)),
            (true, false) => {
                let step = round_step((high - low) / TICKS);
                let count = ((high - low) / step).ceil().max(1.0);
                let marks = (0..=count as u32).map(|n| low + f64::from(n) * step).map(|at| (at, short(at))).collect();
                (low + count * step, marks)
            }
        };
        Self { log: axis.log, low, high, from, to, marks }
    }

    fn at(&self, value: f64) -> f64 {
        let part = if self.log {
            (value.max(self.low) / self.low).log10() / (self.high / self.low).log10()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.from + part.clamp(0.0, 1.0) * (self.to - self.from)
    }
}

/// The powers of ten from `low` to `high`; if they are few, the twos and fives between them, too.
fn decades(low: f64, high: f64) -> Vec<(f64, String)> {
    let (first, last) = (low.log10().round() as i32, high.log10().round() as i32);
    let factors: &[f64] = if last - first <= 2 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let all = (first..=last).flat_map(|power| factors.iter().map(move |factor| factor * 10_f64.powi(power)));
    all.filter(|at| *at <= high * 1.000_001).map(|at| (at, short(at))).collect()
}

/// The next 1, 2 or 5 times a power of ten.
fn round_step(about: f64) -> f64 {
    let power = 10_f64.powf(about.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= about * 0.999_999);
    factor.unwrap_or(10.0) * power
}

/// A number in few letters.
pub fn short(number: f64) -> String {
    let (scaled, unit) = match number.abs() {
        size if size >= 1e9 => (number / 1e9, "G"),
        size if size >= 1e6 => (number / 1e6, "M"),
        size if size >= 1e4 => (number / 1e3, "k"),
        _ => (number, ""),
    };
    let digits = match scaled.abs() {
        size if size >= 100.0 || scaled == scaled.round() => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{scaled:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{unit}")
}

/// A text as it may stand in SVG and HTML.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Groups of bars beside each other: one group for each name in `groups`, one bar in it for each series.
pub fn bars(title: &str, y: &Axis, groups: &[String], series: &[Series]) -> String {
    let heights = series.iter().flat_map(|one| one.points.iter().map(|(_, height)| *height));
    let scale = Scale::new(y, heights, (HEIGHT - BOTTOM, TOP));
    let room = (WIDTH - LEFT - RIGHT) / groups.len().max(1) as f64;
    let longest = LETTER * groups.iter().map(|group| group.chars().count()).max().unwrap_or(0) as f64;
    let leans = longest > room;
    let mut svg = begun(title, &scale, &y.name, series, if leans { longest * LEAN.to_radians().sin() } else { 0.0 });
    let width = room * 0.8 / series.len().max(1) as f64;
    for (at, group) in groups.iter().enumerate() {
        let left = LEFT + room * at as f64;
        let (middle, under) = (left + room / 2.0, HEIGHT - BOTTOM + 18.0);
        if leans {
            let place = format!("translate({:.1} {:.1}) rotate(-{LEAN})", middle + 4.0, under - 2.0);
            let _ = write!(svg, r#"<text transform="{place}" text-anchor="end">{}</text>"#, escaped(group));
        } else {
            put(&mut svg, middle, under, "middle", group);
        }
        for (number, one) in series.iter().enumerate() {
            let Some((_, height)) = one.points.get(at).filter(|(_, height)| height.is_finite()) else { continue };
            let (x, top) = (left + room * 0.1 + width * number as f64, scale.at(*height));
            let tall = (HEIGHT - BOTTOM - top).max(0.0);
            let colour = number % COLOURS;
            let _ = write!(
                svg,
                r#"<rect class="bar f{colour}" x="{x:.1}" y="{top:.1}" width="{:.1}" height="{tall:.1}"><title>{}: {} {}</title></rect>"#,
                (width - 1.0).max(0.5),
                escaped(&one.name),
                short(*height),
                escaped(&y.name),
            );
            if width >= 26.0 {
                put(&mut svg, x + width / 2.0, top - 3.0, "middle", &short(*height));
            }
        }
    }
    ended(svg)
}

/// Lines over a common horizontal axis.
pub fn lines(title: &str, x: &Axis, y: &Axis, series: &[Series]) -> String {
    let points = || series.iter().flat_map(|one| &one.points);
    let across = Scale::new(x, points().map(|point| point.0), (LEFT, WIDTH - RIGHT));
    let scale = Scale::new(y, points().map(|point| point.1), (HEIGHT - BOTTOM, TOP));
    let mut svg = begun(title, &scale, &y.name, series, 0.0);
    for (value, words) in &across.marks {
        let at = across.at(*value);
        let _ = write!(svg, r#"<line class="grid" x1="{at:.1}" y1="{TOP}" x2="{at:.1}" y2="{}"/>"#, HEIGHT - BOTTOM);
        put(&mut svg, at, HEIGHT - BOTTOM + 18.0, "middle", words);
    }
    put(&mut svg, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 12.0, "middle", &x.name);
    for (number, one) in series.iter().enumerate() {
        let drawn = one.points.iter().filter(|(x, y)| x.is_finite() && y.is_finite());
        let drawn: Vec<String> = drawn.map(|(x, y)| format!("{:.1},{:.1}", across.at(*x), scale.at(*y))).collect();
        let (colour, drawn) = (number % COLOURS, drawn.join(" "));
        let _ = write!(svg, r#"<polyline class="line s{colour}" points="{drawn}"/>"#);
    }
    ended(svg)
}

/// A chart without its contents, with so much more room below.
fn begun(title: &str, y: &Scale, y_name: &str, series: &[Series], below: f64) -> String {
    let said = escaped(title);
    let height = HEIGHT + below.ceil();
    let mut svg = format!(
        r#"<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-label="{said}">{STYLE}"#
    );
    let _ = write!(svg, r#"<text class="title" x="10" y="20">{said}</text>"#);
    let mut x = LEFT;
    for (number, one) in series.iter().enumerate() {
        let colour = number % COLOURS;
        let _ = write!(svg, r#"<rect class="key f{colour}" x="{x:.1}" y="33" width="10" height="10"/>"#);
        put(&mut svg, x + 14.0, 42.0, "start", &one.name);
        x += 30.0 + LETTER * one.name.chars().count() as f64;
    }
    for (value, words) in &y.marks {
        let at = y.at(*value);
        let _ = write!(svg, r#"<line class="grid" x1="{LEFT}" y1="{at:.1}" x2="{}" y2="{at:.1}"/>"#, WIDTH - RIGHT);
        put(&mut svg, LEFT - 6.0, at + 4.0, "end", words);
    }
    let (middle, bottom) = ((TOP + HEIGHT - BOTTOM) / 2.0, HEIGHT - BOTTOM);
    let _ = write!(
        svg,
        r#"<text class="unit" transform="translate(16 {middle:.1}) rotate(-90)" text-anchor="middle">{}</text><path class="axis" fill="none" d="M{LEFT} {TOP}V{bottom}H{}"/>"#,
        escaped(y_name),
        WIDTH - RIGHT
    );
    svg
}

fn put(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = write!(svg, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escaped(text));
}

fn ended(mut svg: String) -> String {
    svg.push_str("</svg>");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, heights: &[f64]) -> Series {
        Series { name: name.into(), points: (0..).map(f64::from).zip(heights.iter().copied()).collect() }
    }

    fn numbers(svg: &str, class: &str, attribute: &str) -> Vec<f64> {
        let opening = format!("class=\"{class}");
        let parts = svg.split(&opening).skip(1);
        let read = |part: &str| part.split(&format!("{attribute}=\"")).nth(1)?.split('"').next()?.parse().ok();
        parts.filter_map(read).collect()
    }

    #[test]
    fn bars_are_as_tall_as_their_numbers() {
        let groups = ["put".to_owned(), "get".to_owned()];
        let svg =
            bars("Rate", &Axis::linear("operations/s"), &groups, &[series("a", &[10.0, 20.0]), series("b", &[40.0])]);
        let tall = numbers(&svg, "bar ", "height");
        assert_eq!(tall.len(), 3, "what is not there has no bar: {svg}");
        assert!((tall[1] / tall[0] - 4.0).abs() < 0.01 && (tall[2] / tall[0] - 2.0).abs() < 0.01, "{tall:?}");
        for words in ["Rate", "operations/s", ">put<", ">get<", ">a<", ">b<", ">40<", "prefers-color-scheme:dark"] {
            assert!(svg.contains(words), "{words} is missing");
        }
    }

    #[test]
    fn names_without_room_lean_and_the_chart_grows_for_them() {
        let chart = |count: usize| {
            let groups: Vec<String> = (0..count).map(|number| format!("put through the balancer {number}")).collect();
            let svg = bars("Rate", &Axis::log("operations/s"), &groups, &[series("a", &vec![5.0; count])]);
            let tall: f64 = svg.split("\" height=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap();
            (tall, svg.matches("rotate(-50)").count())
        };
        assert_eq!(chart(2), (HEIGHT, 0));
        let (tall, leaning) = chart(20);
        assert!(leaning == 20 && tall > HEIGHT + 26.0 * LETTER * 0.7, "{tall}");
    }

    #[test]
    fn equal_ratios_are_equally_far_apart_on_a_logarithmic_axis() {
        let scale = Scale::new(&Axis::log("us"), [3.0, 30_000.0].into_iter(), (0.0, 100.0));
        assert_eq!((scale.low, scale.high), (1.0, 100_000.0));
        assert!((scale.at(10.0) - 20.0).abs() < 1e-9 && (scale.at(1_000.0) - 60.0).abs() < 1e-9);
        assert_eq!(scale.at(0.0), 0.0, "what is not positive stands at the beginning");
        let words: Vec<&str> = scale.marks.iter().map(|(_, words)| &words[..]).collect();
        assert_eq!(words, ["1", "10", "100", "1000", "10k", "100k"]);
    }

    #[test]
    fn ticks_are_round_and_hold_every_value() {
        for most in [0.003, 1.0, 7.0, 99.0, 12_345.0, 8e9] {
            let scale = Scale::new(&Axis::linear("n"), [most].into_iter(), (0.0, 1.0));
            assert!(scale.high >= most && scale.high <= most * 2.0, "{most}: {}", scale.high);
            assert!((3..=8).contains(&scale.marks.len()), "{most}: {:?}", scale.marks);
        }
        assert_eq!(
            [short(0.5), short(1_500.0), short(25_000.0), short(2.5e6), short(0.0)],
            ["0.5", "1500", "25k", "2.5M", "0"]
        );
    }

    #[test]
    fn lines_stay_inside_and_hostile_words_are_words() {
        let svg =
            lines("a<b & \"c\"", &Axis::linear("s"), &Axis::log("us"), &[series("<script>", &[0.0, 5.0, 9_000.0])]);
        assert!(svg.contains("a&lt;b &amp; &quot;c&quot;") && !svg.contains("<script>"), "{svg}");
        let points = svg.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        for point in points.split(' ') {
            let (x, y) = point.split_once(',').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((LEFT..=WIDTH - RIGHT).contains(&x) && (TOP..=HEIGHT - BOTTOM).contains(&y), "{point}");
        }
        assert_eq!(points.split(' ').count(), 3);
    }

    #[test]
    fn nothing_to_draw_is_no_trouble() {
        for svg in [
            bars("t", &Axis::log("u"), &[], &[]),
            lines("t", &Axis::log("u"), &Axis::linear("v"), &[series("none", &[f64::NAN])]),
        ] {
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>") && !svg.contains("NaN"), "{svg}");
        }
    }
}
