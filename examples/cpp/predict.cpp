// Predict with an exported model: OpenVINO and nothing else. Prints the classes of a classifier, the boxes of a detector.
//
//     predict EXPORTED_FOLDER PICTURE.ppm [LOWEST_SCORE]
//
// EXPORTED_FOLDER is what tools/export.py wrote, with end2end.onnx. The picture is a binary PPM of 8 bits, which Pillow
// and ImageMagick write.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <openvino/core/preprocess/pre_post_process.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/convert.hpp>
#include <openvino/op/maximum.hpp>
#include <openvino/op/minimum.hpp>
#include <openvino/op/reduce_min.hpp>
#include <openvino/runtime/core.hpp>
#include <openvino/runtime/properties.hpp>

struct Picture {
    size_t width, height;
    std::vector<uint8_t> pixels;  // RGB, row by row
};

std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + " cannot be read");
    return {std::istreambuf_iterator<char>(file), {}};
}

Picture read_ppm(const std::string& path) {
    const std::string text = read(path);
    size_t place = 0, numbers[3] = {};
    const auto space = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
    const auto word = [&] {
        while (place < text.size() && (space(text[place]) || text[place] == '#'))
            place = text[place] == '#' ? std::min(text.find('\n', place), text.size()) : place + 1;
        const size_t start = place;
        while (place < text.size() && !space(text[place])) ++place;
        return text.substr(start, place - start);
    };
    const bool binary = word() == "P6";
    for (size_t& number : numbers) number = binary ? std::strtoul(word().c_str(), nullptr, 10) : 0;
    const auto [width, height, largest] = numbers;
    const bool sized = width > 0 && width < 65536 && height > 0 && height < 65536 && largest == 255;
    if (!sized || text.size() != place + 1 + 3 * width * height)
        throw std::runtime_error(path + " is no binary PPM of 8 bits");
    return {width, height, {text.begin() + place + 1, text.end()}};
}

// The text of a value in JSON, behind the first such key.
std::string value(const std::string& json, const std::string& key) {
    const std::string name = '"' + key + "\":";
    size_t start = json.find(name);
    if (start == std::string::npos) throw std::runtime_error("export.json has no " + key + ": export the model again");
    start = json.find_first_not_of(" \n", start + name.size());
    bool quoted = false;
    int depth = 0;
    for (size_t end = start; end < json.size(); ++end) {
        const char c = json[end];
        if (quoted && c == '\\') {
            ++end;
        } else if (c == '"') {
            quoted = !quoted;
        } else if (!quoted) {
            if (depth == 0 && (c == ',' || c == '}' || c == ']' || c == '\n')) return json.substr(start, end - start);
            depth += (c == '[' || c == '{') - (c == ']' || c == '}');
        }
    }
    throw std::runtime_error("export.json is damaged at " + key);
}

bool has(const std::string& json, const std::string& key) { return json.find('"' + key + "\":") != std::string::npos; }

double number(const std::string& json, const std::string& key) {
    return std::strtod(value(json, key).c_str(), nullptr);
}

// The strings in such a text; escapes other than a quote and a backslash stay as they are.
std::vector<std::string> strings(const std::string& json) {
    std::vector<std::string> found;
    bool quoted = false;
    for (size_t i = 0; i < json.size(); ++i) {
        if (json[i] == '"') {
            quoted = !quoted;
            if (quoted) found.emplace_back();
        } else if (quoted) {
            if (json[i] == '\\' && i + 1 < json.size() && (json[i + 1] == '"' || json[i + 1] == '\\')) ++i;
            found.back() += json[i];
        }
    }
    return found;
}

// Without VNNI a CPU adds two products of codes in 16 bits. A maximum keeps the inputs of layers that could saturate them
// from becoming integers again, so that these layers are computed in float. Its other operand, the lowest float, is made
// from the picture: OpenVINO 2026.4 fails where it folds the maximum of two constants, as learned queries are.
void without_saturation(ov::Model& model, const std::vector<std::string>& inputs) {
    const auto constant = ov::op::v0::Constant::create(ov::element::f32, {}, {std::numeric_limits<float>::lowest()});
    const auto picture = std::make_shared<ov::op::v0::Convert>(model.input("image"), ov::element::f32);
    const auto axes = ov::op::v0::Constant::create(ov::element::i64, {4}, {0, 1, 2, 3});
    const auto smallest = std::make_shared<ov::op::v1::ReduceMin>(picture, axes);
    const auto lowest = std::make_shared<ov::op::v1::Minimum>(smallest, constant);
    std::set<std::string> missing(inputs.begin(), inputs.end());
    for (const auto& node : model.get_ordered_ops())
        for (const auto& output : node->outputs())
            for (const std::string& name : output.get_names()) {
                if (!missing.erase(name)) continue;
                const auto readers = output.get_target_inputs();
                const auto maximum = std::make_shared<ov::op::v1::Maximum>(output, lowest);
                for (ov::Input<ov::Node> reader : readers) reader.replace_source_output(maximum);
            }
    if (!missing.empty()) throw std::runtime_error("end2end.onnx has no tensor " + *missing.begin());
}

bool has_vnni() {
    std::ifstream file("/proc/cpuinfo");
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    return text.find("vnni") != std::string::npos;
}

int predict(const std::string& folder, const std::string& path, double lowest) {
    const std::string about = read(folder + "/export.json"), whole = value(about, "end2end");
    const std::vector<std::string> classes = strings(value(about, "classes"));
    if (!has(whole, "file"))
        throw std::runtime_error(folder + " has no end2end.onnx: " + value(whole, "refused"));
    const std::string rule = value(whole, "input");
    if (has(rule, "refused")) throw std::runtime_error(path + " cannot be made an input: " + value(rule, "refused"));
    const Picture picture = read_ppm(path);
    size_t width = picture.width, height = picture.height;
    const std::string resize = value(rule, "resize"), crop = value(rule, "crop"), pad = value(rule, "pad");
    if (has(resize, "width")) {
        width = number(resize, "width"), height = number(resize, "height");
    } else if (resize != "null") {  // the picture keeps its shape
        double long_edge = std::max(width, height), short_edge = std::min(width, height), to = 1, from = 0;
        if (has(resize, "long")) to = number(resize, "long"), from = long_edge;
        if (has(resize, "short") && (from == 0 || number(resize, "short") / short_edge < to / from))
            to = number(resize, "short"), from = short_edge;
        const bool nearest = value(resize, "round") == "\"nearest\"";
        for (size_t* side : {&width, &height})
            *side = std::max(size_t(nearest ? *side * (to / from) + 0.5 : to * *side / from), size_t(1));
    }
    const double across = double(width) / picture.width, down = double(height) / picture.height;

    const std::string graph = read(folder + "/end2end.onnx");
    ov::Core core;
    const std::shared_ptr<ov::Model> network = core.read_model(graph, ov::Tensor());
    if (!has_vnni()) without_saturation(*network, strings(value(whole, "saturating")));
    ov::preprocess::PrePostProcessor steps(network);
    ov::preprocess::InputInfo& image = steps.input("image");
    const ov::Shape shape{1, picture.height, picture.width, 3};
    image.tensor().set_element_type(ov::element::u8).set_layout("NHWC").set_shape(shape);
    image.model().set_layout("NHWC");
    if (height != picture.height || width != picture.width) {
        using Way = ov::preprocess::ResizeAlgorithm;
        const std::string way = value(resize, "interpolation");
        const bool bicubic = way == "\"bicubic\"";
        if (!bicubic && way != "\"bilinear\"") throw std::runtime_error("interpolation " + way + " is not known here");
        image.preprocess().resize(bicubic ? Way::RESIZE_BICUBIC_PILLOW : Way::RESIZE_BILINEAR_PILLOW, height, width);
    }
    if (crop != "null") {
        const size_t high = std::min<size_t>(number(crop, "height"), height);
        const size_t wide = std::min<size_t>(number(crop, "width"), width);
        const int top = std::nearbyint((height - high) / 2.0), left = std::nearbyint((width - wide) / 2.0);
        image.preprocess().crop({0, top, left, 0}, {1, top + int(high), left + int(wide), 3});
        height = high, width = wide;
    }
    if (pad != "null") {
        const size_t square = has(pad, "square") ? std::max(width, height) : 0;
        const size_t high = std::max({height, square, has(pad, "height") ? size_t(number(pad, "height")) : 0});
        const size_t wide = std::max({width, square, has(pad, "width") ? size_t(number(pad, "width")) : 0});
        image.preprocess()
            .convert_element_type(ov::element::f32)  // OpenVINO pads no integers
            .pad({0, 0, 0, 0}, {0, int(high - height), int(wide - width), 0}, float(number(pad, "value")),
                 ov::preprocess::PaddingMode::CONSTANT)
            .convert_element_type(ov::element::u8);
        height = high, width = wide;
    }
    double high = 0, wide = 0;
    if (std::sscanf(value(whole, "size").c_str(), "[ %lf , %lf", &high, &wide) != 2)
        throw std::runtime_error("export.json is damaged at size");
    if (value(whole, "any_size") != "true" && (high != height || wide != width))
        throw std::runtime_error(path + " is " + std::to_string(width) + " x " + std::to_string(height) + " for the graph," +
                                 " which takes " + std::to_string(int(wide)) + " x " + std::to_string(int(high)));
    if (value(whole, "channels") == "\"BGR\"") image.preprocess().reverse_channels();
    // Else it computes float layers in bfloat16 on CPUs that have it, and quantizes some inputs a second time.
    ov::CompiledModel model = core.compile_model(steps.build(), "CPU", ov::hint::inference_precision(ov::element::f32),
                                                 ov::hint::dynamic_quantization_group_size(0));
    ov::InferRequest request = model.create_infer_request();
    request.set_tensor("image", ov::Tensor(ov::element::u8, shape, const_cast<uint8_t*>(picture.pixels.data())));
    request.infer();

    const auto gives = [&](const std::string& name) {
        const auto& outputs = model.outputs();
        return std::any_of(outputs.begin(), outputs.end(), [&](const auto& o) { return o.get_names().count(name); });
    };
    const auto name = [&](int64_t label) {
        return size_t(label) < classes.size() ? classes[label] : std::to_string(label);
    };
    if (gives("topk_scores")) {
        const ov::Tensor scores = request.get_tensor("topk_scores"), labels = request.get_tensor("topk_labels");
        for (size_t i = 0; i < std::min<size_t>(3, scores.get_size()); ++i)
            std::printf("%s: %.1f %%\n", name(labels.data<int64_t>()[i]).c_str(), 100 * scores.data<float>()[i]);
    } else if (gives("dets")) {  // (1, K, 5): left, top, right, bottom in pixels of what the network saw, score
        const ov::Tensor dets = request.get_tensor("dets"), labels = request.get_tensor("labels");
        for (size_t i = 0; i < labels.get_size(); ++i) {
            const float* box = dets.data<float>() + 5 * i;
            if (box[4] > lowest)
                std::printf("%s: %.0f %% at %.0f, %.0f, %.0f, %.0f\n", name(labels.data<int64_t>()[i]).c_str(),
                            100 * box[4], box[0] / across, box[1] / down, box[2] / across, box[3] / down);
        }
    } else {
        throw std::runtime_error(folder + " is the export of neither a classifier nor a detector");
    }
    return 0;
}

int main(int count, char** words) {
    if (count != 3 && count != 4) {
        std::fprintf(stderr, "predict EXPORTED_FOLDER PICTURE.ppm [LOWEST_SCORE]\n");
        return 2;
    }
    try {
        return predict(words[1], words[2], count == 4 ? std::stod(words[3]) : 0.3);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
